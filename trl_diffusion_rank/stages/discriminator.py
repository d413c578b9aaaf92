"""
Train an aesthetic discriminator: a scorer that was taught by real images what generated ones lack.

    trl-diffusion-rank discriminator --recipe recipes/coyo_discriminator.yaml
    trl-diffusion-rank discriminator --dataset_name runs/mine/generate --output_dir runs/mine/discriminator \
        --model_name_or_path openai/clip-vit-large-patch14 --trainable_layers 4

Reads rows with a real image among the generated ones, as the stage `generate` writes them with `include_real`. A share
of the captions, `test_share`, is never trained: on those it tells how often the real image has the highest score, and
how much of that file sizes, codecs, colours and sharpness explain.

    <output_dir>/                  the discriminator and its processor: `model` of the scorer `discriminator`
    <output_dir>/metrics.json      what it was measured to do, with intervals, and the audit of shortcuts
    <output_dir>/table.md          the same as tables
    <output_dir>/rows.png          rows of images from the most to the least real
"""

HELP = "train a scorer on real and generated images of the same captions"
INPUTS = {"dataset_name": "generate"}
# What `--help` reads without importing torch
CONFIG_FILES = ("trl_diffusion_rank.trainers.aesthetic_discriminator_config",)

# Options of TRL's ModelConfig that a discriminator's towers don't have
_UNUSED = ("model_revision", "dtype", "attn_implementation", "load_in_8bit", "load_in_4bit")


def argument_classes() -> tuple[type, ...]:
    from trl import ModelConfig, ScriptArguments

    from trl_diffusion_rank.trainers.aesthetic_discriminator_config import AestheticDiscriminatorTrainerConfig

    return ScriptArguments, AestheticDiscriminatorTrainerConfig, ModelConfig


def check(options) -> None:
    """Refuse what the config would refuse, before earlier stages have run for hours."""
    _, config_class, _ = argument_classes()
    config_class.check_options(options)
    check_other_options(options, options, options.trainable_layers)


def check_other_options(script_args, model_args, trainable_layers) -> None:
    """Refuse options of TRL's own classes that do nothing here."""
    from trl import ModelConfig

    if script_args.dataset_streaming:
        raise ValueError("`dataset_streaming` can't be used: captions are split before training. Leave it out.")
    if script_args.ignore_bias_buffers:
        raise ValueError("`ignore_bias_buffers` is for language models with mask buffers. Leave it out.")
    for name in _UNUSED:
        value = getattr(model_args, name)
        if value != ModelConfig.__dataclass_fields__[name].default:
            raise ValueError(
                f"`{name}={value!r}` can't be set for a discriminator, whose towers are loaded in float32 as they "
                "are. Leave it out."
            )
    if model_args.use_peft and trainable_layers is not None:
        raise ValueError(
            f"`use_peft` and `trainable_layers={trainable_layers!r}` both say what of the backbone is trained. Leave "
            "one of them out."
        )


def evaluate(trainer, train, test) -> None:
    """Measure the discriminator on the test captions, and leave the report beside it and in its card."""
    from trl_diffusion_rank.evaluation import discrimination as d

    args = trainer.args
    path = trainer.evaluation_path
    scores = trainer.score(test)  # all processes score; one looks at what comes out
    closed = d.closed_shortcuts(test, path, trainer.score, args.real_source)
    if not trainer.is_world_process_zero():
        return
    metrics = d.discrimination(d.ScoredGroups.of(test, scores, args.real_source))
    metrics["path"] = str(path)
    metrics["closed"] = closed
    metrics["baselines"] = d.baselines(train, test, path, args.real_source, args.seed)
    d.save_report(args.output_dir, metrics, d.picture(test, scores))
    tables = d.tables(metrics)
    print("\n\n".join(tables.values()))
    print(f"\nThe discriminator {d.sentence(metrics)}.")
    trainer.report = {**tables, "A few rows, from the most to the least real": "![Rows of images](rows.png)"}


def main(script_args, training_args, model_args) -> None:
    from trl import get_peft_config

    from trl_diffusion_rank.data.caption_groups import read_groups, split_by_caption, without_captions_of
    from trl_diffusion_rank.data.loading import load_splits
    from trl_diffusion_rank.stages._common import require, run_training
    from trl_diffusion_rank.trainers.aesthetic_discriminator_trainer import AestheticDiscriminatorTrainer

    require("discriminator", dataset_name=script_args.dataset_name, model_name_or_path=model_args.model_name_or_path)
    check_other_options(script_args, model_args, training_args.trainable_layers)
    splits = load_splits(script_args.dataset_name, script_args.dataset_config)
    if script_args.dataset_train_split not in splits:
        raise ValueError(
            f"`dataset_train_split` is {script_args.dataset_train_split!r}; {script_args.dataset_name!r} has the "
            f"splits {', '.join(splits)}."
        )
    train = read_groups(splits[script_args.dataset_train_split], "train", training_args.real_source)
    if script_args.dataset_test_split in splits:
        test = read_groups(splits[script_args.dataset_test_split], "test", training_args.real_source)
        train = without_captions_of(train, test)
    else:
        train, test = split_by_caption(train, training_args.test_share, training_args.seed)

    trainer = AestheticDiscriminatorTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test if training_args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
    )
    run_training(trainer, script_args.dataset_name, measure=lambda: evaluate(trainer, train, test))


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("discriminator")
