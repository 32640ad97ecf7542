"""Checks settings of TRL's and transformers' trainers that would train something other than what is served."""

from typing import Any

from preft_hf.forward.labels import dropped_column, has_mask_column
from preft_hf.training.collator import PrefillMaskCollator

# they call the model on prompt and response without labels, and drop a mask that a collator adds
UNLABELLED = frozenset(
    f"{name}Trainer" for name in ("A2PO", "CPO", "GKD", "GOLD", "IWOPD", "OnlineDPO", "ORPO", "SDFT", "SDPO")
)


def check_trainer(trainer: Any) -> None:
    """Checks a trainer's settings; call it after creating the trainer and before `train()`.

    A forward raises on what it can see (rows without a prompt, labels withheld). This function finds what only the
    trainer's settings show.

    Args:
        trainer: transformers' Trainer or one of TRL's, with a PreFT adapter on its model
    Raises:
        ValueError: all settings that do not fit, each with its remedy.
    """
    args, faults = trainer.args, []
    if getattr(args, "use_vllm", False):
        faults.append(
            "use_vllm is True: TRL would merge the adapter into vLLM's weights, where it acts on every token; set it "
            "to False, so that transformers generates with the adapter on the prompt alone"
        )
    if getattr(trainer, "tools", None) or getattr(trainer, "environment_factory", None):
        faults.append(
            "tools or an environment: each call generates with earlier responses in the prompt, which adapts them, "
            "but the loss is computed with them base; use single-turn prompts, one for each call"
        )
    if getattr(trainer, "rollout_func", None) is not None:
        faults.append(
            "rollout_func: completions that are not from this model's generate may differ from what is served; omit it"
        )
    smoothing = getattr(args, "label_smoothing_factor", 0.0)
    withheld = bool(smoothing) or getattr(trainer, "compute_loss_func", None) is not None
    if withheld and not isinstance(trainer.data_collator, PrefillMaskCollator):
        found = f"label_smoothing_factor is {smoothing}" if smoothing else "compute_loss_func is set"
        faults.append(
            f"{found}: the labels then do not reach the model; use data_collator=PrefillMaskCollator(collator), which "
            "passes the mask"
        )
    keeps = args.remove_unused_columns is False and isinstance(trainer.data_collator, PrefillMaskCollator)
    if not keeps and any(has_mask_column(getattr(trainer, name, None)) for name in ("train_dataset", "eval_dataset")):
        faults.append(dropped_column(trainer))
    faults += _faults_of_optimizer(getattr(trainer, "optimizer", None))
    active = [name for name in getattr(getattr(trainer, "model", None), "active_adapters", []) if name != "default"]
    if getattr(args, "load_best_model_at_end", False) and active:
        faults.append(
            f"load_best_model_at_end with the adapter {active[0]!r}: a Trainer looks for the best weights in the "
            f"checkpoint's own folder and that adapter is saved in its subfolder {active[0]}, so the last weights "
            "would be kept: name the adapter 'default', or set it to False and load the best checkpoint's subfolder"
        )
    faults += _faults_of_kind(trainer, {kind.__name__ for kind in type(trainer).__mro__})
    if faults:
        raise ValueError("; ".join(faults))


def _faults_of_optimizer(optimizer: Any) -> list[str]:
    """Returns what an optimizer of PEFT's would leave undone, as it looks for parameters named lora_A and lora_B."""
    if optimizer is None:
        return []
    if "LoraFAOptimizer" in {kind.__name__ for kind in type(optimizer).__mro__}:
        return ["LoraFAOptimizer finds no lora_A and lora_B in a PreFT adapter, so it is AdamW; use torch.optim.AdamW"]
    if any(not group["params"] for group in optimizer.param_groups):
        return [
            "the optimizer has a group without parameters, as peft's create_loraplus_optimizer makes it of a PreFT "
            "adapter, whose A and B would learn at one rate; use preft_hf.trl.create_loraplus_optimizer"
        ]
    return []


def _faults_of_kind(trainer: Any, kinds: set[str]) -> list[str]:
    """Returns the faults in how trainers of this kind call the model."""
    if kinds & {"RewardTrainer", "PRMTrainer"}:
        return ["a reward model: it does not decode, so prefill-only equals plain LoRA; use peft.LoraConfig"]
    if kinds & UNLABELLED:
        return [
            f"{min(kinds & UNLABELLED)} gives the model neither labels nor a mask, in training nor in evaluation, so "
            "nothing tells prompt from response; use SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer or RLOOTrainer"
        ]
    collator = trainer.data_collator
    if "TPOTrainer" in kinds and not isinstance(collator, PrefillMaskCollator):
        return [
            "TPOTrainer gives the model no labels; use data_collator=PrefillMaskCollator(collator) around a "
            f"{type(collator).__name__}, which the trainer has now"
        ]
    has_logits = getattr(trainer, "compute_metrics", None) is not None and not trainer.args.prediction_loss_only
    if has_logits and "KTOTrainer" in kinds:
        return ["compute_metrics is set: KTOTrainer computes its logits without labels and accepts no mask; omit it"]
    if has_logits and kinds & {"SFTTrainer", "DPOTrainer"} and not isinstance(collator, PrefillMaskCollator):
        return [
            "compute_metrics is set: TRL computes its logits without labels; use "
            f"data_collator=PrefillMaskCollator(collator) around a {type(collator).__name__}, the trainer's current "
            "collator, or omit compute_metrics"
        ]
    return []
