"""One process of a distributed run: `python -m tests.hf.distributed BASE OUTPUT ddp|fsdp|zero2|zero3 METHOD...`."""

import json
import os
import sys
from pathlib import Path

import accelerate.state
import torch
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer

from tests.hf.training.test_trainers import arguments, tokenizer
from tests.hf.zoo import VOCABULARY, make_preft

NUM_STEPS, ROWS_A_STEP = 6, 4
FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}


def ragged_rows() -> list[dict[str, list[int]]]:
    """Prompts of 3 to 6 tokens and responses of 2 to 5, so that processes have different numbers of labels."""
    source = torch.Generator().manual_seed(0)
    rows = []
    for i in range(16):
        prompt, response = 3 + i % 4, 2 + (i // 4 + i) % 4
        ids = torch.randint(4, VOCABULARY, (prompt + response,), generator=source).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def allow_fsdp_on_cpu() -> None:
    """accelerate drops FSDP in silence where there is no GPU; PyTorch's fully_shard runs over gloo as well."""
    make = accelerate.state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **others):
        make(self, *args, fsdp_plugin=fsdp_plugin, **others)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = init


def settings(mode: str) -> dict[str, object]:
    if mode == "fsdp":
        allow_fsdp_on_cpu()
        return {"fsdp": True, "fsdp_config": FSDP}
    if mode.startswith("zero"):
        import deepspeed  # pyright: ignore[reportMissingImports]

        # accelerate does it for GPUs alone
        deepspeed.init_distributed("gloo")
        # without the threshold DeepSpeed leaves such small parameters whole
        stage = {"stage": int(mode[4:]), "stage3_param_persistence_threshold": 0}
        stage |= {"stage3_gather_16bit_weights_on_model_save": True}
        sizes = dict.fromkeys(
            ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
        )
        return {"deepspeed": {"zero_optimization": stage, "zero_allow_untested_optimizer": True} | sizes}
    return {}


def make_trainer(base: str, output: Path, method: str, others: dict[str, object]) -> Trainer:
    args = arguments(
        output,
        max_steps=NUM_STEPS,
        per_device_train_batch_size=ROWS_A_STEP // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        **others,
    )
    # after the arguments, as users do it: under ZeRO-3 the base model is read in parts from here on
    model = make_preft(AutoModelForCausalLM.from_pretrained(base), method, init_weights=True)
    return Trainer(
        model=model, args=args, train_dataset=ragged_rows(), data_collator=DataCollatorForSeq2Seq(tokenizer())
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(base: str, output: Path, method: str, others: dict[str, object]) -> None:
    trainer = make_trainer(base, output, method, others)
    trainer.train()
    trainer.save_model(str(output / "final"))
    own = [parameter for name, parameter in trainer.model.named_parameters() if "preft_" in name]
    try:
        trainer.model.save_pretrained(str(output / "direct"))
        refusal = None
    except ValueError as error:
        refusal = str(error)
    resumed: list[float] | None = None
    if "deepspeed" not in others:
        # DeepSpeed's settings are the process's, and cannot be filled in twice
        again = make_trainer(base, output, method, others)
        again.train(resume_from_checkpoint=str(output / "checkpoint-3"))
        resumed = losses(again)
    if trainer.is_world_process_zero():
        facts = {
            "processes": trainer.args.world_size,
            "losses": losses(trainer),
            "losses_resumed": resumed,
            "sharded": all(type(parameter).__name__ == "DTensor" or parameter.numel() == 0 for parameter in own),
            "refusal": refusal,
        }
        (output / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    _, base_folder, folder, mode, *methods = sys.argv
    options = settings(mode)
    for method in methods:
        train(base_folder, Path(folder) / method, method, options)
    if torch.distributed.is_initialized():
        # threads of gloo that are left at the interpreter's end abort the process now and then
        torch.distributed.destroy_process_group()
