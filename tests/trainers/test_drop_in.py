"""TRL's own `trl/scripts/dpo.py` with only the trainer, the config and the model id changed."""

import torch
from datasets import load_from_disk
from diffusers import DiffusionPipeline
from tiny import ranked_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_diffusion_rank import RankedDiffusionDPOConfig, RankedDiffusionDPOTrainer


def main(script_args, training_args, model_args):
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    dataset = load_from_disk(script_args.dataset_name)

    trainer = RankedDiffusionDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    return trainer


def test_trls_script_trains_a_diffusion_model(tmp_path, sdxl_folder):
    pairs = ranked_dataset((2,) * 6)
    pairs = pairs.map(
        lambda row: {"chosen": row["images"][0], "rejected": row["images"][1]}, remove_columns=["images", "ranks"]
    )
    pairs.train_test_split(2, seed=0).save_to_disk(tmp_path / "pairs")

    parser = TrlParser((ScriptArguments, RankedDiffusionDPOConfig, ModelConfig))
    command = f"""
        --dataset_name {tmp_path / "pairs"}
        --model_name_or_path {sdxl_folder}
        --learning_rate 1e-2
        --max_steps 3
        --per_device_train_batch_size 2
        --gradient_accumulation_steps 2
        --eval_strategy steps --eval_steps 3
        --no_bf16 --report_to none
        --use_peft --lora_r 4 --lora_alpha 16
        --output_dir {tmp_path / "out"}
    """
    trainer = main(*parser.parse_args_and_config(command.replace("--no_bf16", "--bf16 false").split()))

    assert trainer.state.global_step == 3
    assert "eval_loss" in trainer.state.log_history[0] | trainer.state.log_history[-2]
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(moved) == sum("lora_B" in name for name, _ in trainer.model.named_parameters()) > 0
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder)
    pipeline.load_lora_weights(str(tmp_path / "out"))
    assert pipeline.get_active_adapters() == ["default_0"]
    assert all(torch.isfinite(p).all() for p in pipeline.unet.parameters())
