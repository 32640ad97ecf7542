"""Results of finished runs in one JSON file per device: a run that is there is not done again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "quality"

Result = dict[str, Any]


class Store:
    """The runs of one kind of device. A key says all that decides a result; results are written as they come.

    Args:
        environment: what runs from here on are made on; that of runs which are there already is kept beside it
    """

    def __init__(self, file: Path, environment: dict[str, str]):
        self.file = file
        self._data: dict[str, Any] = {"environment": environment, "earlier": [], "runs": {}}
        if file.exists():
            before = json.loads(file.read_text())
            known = {_machine(one): one for one in (*before.get("earlier", ()), before["environment"]) if one}
            self._data["earlier"] = [one for machine, one in known.items() if machine != _machine(environment)]
            self._data["runs"] = before["runs"]

    @property
    def dtype(self) -> str:
        """The base model's, for runs from here on."""
        return _machine(self._data["environment"])[1]

    @staticmethod
    def key(**facts: Any) -> str:
        """Returns the key of a run: `part=sft task=cities rank=4 ...`."""
        return " ".join(f"{name}={value}" for name, value in facts.items())

    def once(self, part: str, facts: Result, report: Callable[[str], None], make: Callable[[], Result]) -> Result:
        """Returns a run's facts and result: what a finished run left, or what `make` returns, which is kept.

        Args:
            facts: all that decides the result besides the part, in the order of the key
            report: is told the key of a run that is made
        """
        key = self.key(part=part, **facts)
        found = self.get(key)
        if found is not None:
            return found
        report(key)
        return self.put(key, facts | make())

    def get(self, key: str) -> Result | None:
        """Returns what a finished run left, or None."""
        return self._data["runs"].get(key)

    def put(self, key: str, result: Result) -> Result:
        """Keeps a finished run's result with the dtype that it was made in, on disk before it returns."""
        result = result | {"dtype": self.dtype}
        self._data["runs"][key] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self._data, indent=1) + "\n")
        partial.replace(self.file)
        return result


def _machine(environment: dict[str, str]) -> tuple[str | None, str]:
    """Returns what the figures may depend on: the device and the base model's dtype, bfloat16 if none was noted."""
    return environment.get("device"), environment.get("dtype", "bfloat16")
