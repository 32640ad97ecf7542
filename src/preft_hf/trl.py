"""For TRL's and transformers' trainers: settings that would train something else than what is served."""

from typing import Any

from preft_hf.training import PrefillMaskCollator


def check_trainer(trainer: Any) -> None:
    """Checks a trainer's settings before hours go into it; call it between making the trainer and `train()`.

    What a forward can tell by itself (rows without a prompt, labels withheld) raises there in any case; this finds
    what only the trainer's settings tell.

    Args:
        trainer: transformers' Trainer or one of TRL's, with a PreFT adapter on its model
    Raises:
        ValueError: all settings that do not fit, each with what to do.
    """
    args, faults = trainer.args, []
    if getattr(args, "use_vllm", False):
        faults.append(
            "use_vllm is True: TRL would merge the adapter into vLLM's weights, where it acts on every token; set it "
            "to False, so that transformers generates with the adapter on the prompt alone"
        )
    if getattr(trainer, "tools", None) or getattr(trainer, "environment_factory", None):
        faults.append(
            "tools or an environment: each call generates anew with earlier answers in the prompt, which adapts them, "
            "and the loss is taken with them base; use single-turn prompts, one for each call"
        )
    if getattr(trainer, "rollout_func", None) is not None:
        faults.append(
            "rollout_func: completions that come from elsewhere than this model's generate need not be made as they "
            "are served; leave it out"
        )
    smoothing = getattr(args, "label_smoothing_factor", 0.0)
    withheld = bool(smoothing) or getattr(trainer, "compute_loss_func", None) is not None
    if withheld and not isinstance(trainer.data_collator, PrefillMaskCollator):
        found = f"label_smoothing_factor is {smoothing}" if smoothing else "compute_loss_func is set"
        faults.append(
            f"{found}: the labels then do not reach the model; use data_collator=PrefillMaskCollator(collator), which "
            "passes the mask"
        )
    if any(kind.__name__ in ("RewardTrainer", "PRMTrainer") for kind in type(trainer).__mro__):
        faults.append(
            "a reward model: it reads text and decodes none, so prefill-only is plain LoRA there; use peft.LoraConfig"
        )
    if faults:
        raise ValueError("; ".join(faults))
