import inspect
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from PIL import Image as PILImage
from tiny_discriminator import save_tiny_backbone, tiny_discriminator, tiny_processor
from transformers import Trainer
from trl import RewardTrainer

from trl_diffusion_rank.data.caption_groups import Equalizer
from trl_diffusion_rank.digits.backbone import digits_backbone, digits_processor
from trl_diffusion_rank.digits.data import crawl
from trl_diffusion_rank.discriminator import AestheticDiscriminator, AestheticDiscriminatorProcessor
from trl_diffusion_rank.scorers.discriminator import DiscriminatorScorer
from trl_diffusion_rank.trainers.aesthetic_discriminator_config import AestheticDiscriminatorTrainerConfig
from trl_diffusion_rank.trainers.aesthetic_discriminator_trainer import AestheticDiscriminatorTrainer


WORDS = ("cat", "dog", "sun", "hat", "cup", "map", "fox", "jar")
FEATURES = Features({"prompt": Value("string"), "images": List(Image()), "sources": List(Value("string"))})


def groups(sizes=(3, 3, 2, 3, 3, 2, 3, 3), seed=0) -> Dataset:
    """Rows whose real image is bright and whose others are dark."""
    generator = np.random.default_rng(seed)

    def image(low):
        return PILImage.fromarray(generator.integers(low, low + 100, (16, 16, 3), dtype=np.uint8))

    rows = [
        {
            "prompt": WORDS[i % len(WORDS)],
            "images": [*(image(0) for _ in range(n - 1)), image(150)],
            "sources": [*("ab"[k % 2] for k in range(n - 1)), "real"],
        }
        for i, n in enumerate(sizes)
    ]
    return Dataset.from_list(rows, features=FEATURES)


def config(folder, **options) -> AestheticDiscriminatorTrainerConfig:
    options = {"per_device_train_batch_size": 4, "use_cpu": True} | options
    return training.config(AestheticDiscriminatorTrainerConfig, folder, **options)


def trainer_of(folder, kind="clip", peft_config=None, data=None, **options) -> AestheticDiscriminatorTrainer:
    return AestheticDiscriminatorTrainer(
        model=tiny_discriminator(kind, patch_layer=1),
        args=config(folder, **options),
        train_dataset=groups() if data is None else data,
        processing_class=tiny_processor(kind),
        peft_config=peft_config,
    )


# TRL


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (RewardTrainer, "_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
        (RewardTrainer, "_set_signature_columns_if_needed", ["self"]),
        (RewardTrainer, "compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        (RewardTrainer, "create_model_card", ["self", "model_name", "dataset_name", "tags"]),
        (Trainer, "_save", ["self", "output_dir", "state_dict"]),
    ],
)
def test_private_names_and_their_parameters(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_init_takes_what_the_parents_takes():
    ours = list(inspect.signature(AestheticDiscriminatorTrainer.__init__).parameters)
    assert ours == list(inspect.signature(RewardTrainer.__init__).parameters)
    assert "is_training" in inspect.signature(Trainer._get_dataloader).parameters


def gathers(tensor):
    return tensor


def test_one_real_and_one_generated_image_is_trls_bradley_terry():
    scores = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()  # real first
    stand_in = {
        "model": torch.nn.Linear(1, 1).train(),
        "accelerator": SimpleNamespace(gather=gathers, gather_for_metrics=gathers),
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    theirs = SimpleNamespace(**stand_in, args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(10, 1)}
    logits = scores.T.reshape(-1, 1)  # TRL's batch is [all chosen, all rejected]
    expected = RewardTrainer.compute_loss(theirs, lambda **_: SimpleNamespace(logits=logits), inputs)
    (expected_gradient,) = torch.autograd.grad(expected, scores)
    expected_metrics = {name: values[-1] for name, values in stand_in["_metrics"]["train"].items()}

    stand_in["_metrics"] = {"train": defaultdict(list)}
    ours = SimpleNamespace(**stand_in, args=SimpleNamespace(bce_weight=0.0, caption_negative_weight=0.0))
    ours._store_metrics = lambda *args: AestheticDiscriminatorTrainer._store_metrics(ours, *args)
    inputs = {"ranks": torch.tensor([[1, 2]]).expand(5, 2), "mask": torch.ones(5, 2, dtype=torch.bool)}
    outputs = SimpleNamespace(logits=scores.reshape(-1, 1), pair_scores=None)
    loss = AestheticDiscriminatorTrainer.compute_loss(ours, lambda **_: outputs, inputs)
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    metrics = {name: values[-1] for name, values in ours._metrics["train"].items()}
    for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert metrics[name] == pytest.approx(expected_metrics[name], abs=1e-6), name
    assert metrics["top1"] == metrics["accuracy"]


# Loss


def test_loss_and_metrics_of_a_batch_by_hand(tmp_path):
    trainer = trainer_of(tmp_path, bce_weight=0.5, caption_negative_weight=2.0)
    scores = torch.tensor([2.0, 1.0, -1.0, 0.0, 3.0])
    pairs = torch.tensor([[2.0, 0.0], [1.0, 4.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    inputs = {
        "ranks": torch.tensor([[1, 2, 2], [2, 1, 0]]),
        "mask": torch.tensor([[True, True, True], [True, True, False]]),
        "caption_of": torch.tensor([0, 0, 0, 1, 1]),
    }
    outputs = SimpleNamespace(logits=scores.unsqueeze(1), pair_scores=pairs)
    trainer.model.train()
    loss, returned = trainer.compute_loss(lambda **_: outputs, inputs, return_outputs=True)
    e = np.exp
    group = [np.log1p(e(-1) + e(-3)), np.log1p(e(-3))]
    bce = [
        (np.log1p(e(-2)) + (np.log1p(e(1)) + np.log1p(e(-1))) / 2) / 2,
        (np.log1p(e(-3)) + np.log1p(e(0))) / 2,
    ]
    captions = [np.log1p(e(-2)), np.log1p(e(-3))]  # of the real images alone: 2 against 0, and 3 against 0
    expected = np.mean([g + 0.5 * b + 2 * c for g, b, c in zip(group, bce, captions, strict=True)])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["top1"] == metrics["accuracy"] == metrics["caption_accuracy"] == 1
    assert metrics["margin"] == pytest.approx(((1 + 3) / 2 + 3) / 2)
    assert (metrics["min_reward"], metrics["max_reward"]) == (-1, 3)
    assert metrics["mean_reward"] == pytest.approx((2 / 3 + 3 / 2) / 2)
    for name, values in (("group_loss", group), ("bce_loss", bce), ("caption_loss", captions)):
        assert metrics[name] == pytest.approx(np.mean(values), rel=1e-6), name
    assert torch.isnan(returned["logits"]).tolist() == [[False] * 3, [False, False, True]]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_training_learns_and_moves_what_it_should(tmp_path, kind):
    trainer = trainer_of(tmp_path, kind, trainable_layers=1, max_steps=20)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"logit_scale.log_scale", "score_head.logit.weight"} <= moved
    assert any(name.startswith("backbone.vision_model.encoder.layers.2.") for name in moved)
    assert not any(name.startswith(("backbone.text", "backbone.vision_model.encoder.layers.1.")) for name in moved)
    with (tmp_path / "log_history.jsonl").open() as file:
        assert [json.loads(line) for line in file] == trainer.state.log_history
    logs = [log for log in trainer.state.log_history if "group_loss" in log]
    assert logs[-1]["group_loss"] < 0.5 * logs[0]["group_loss"]
    assert logs[-1]["top1"] == 1


def test_without_captions_there_are_no_caption_losses(tmp_path):
    folder = save_tiny_backbone("clip", tmp_path / "backbone")
    args = config(tmp_path / "out", text_conditioned=False)
    trainer = AestheticDiscriminatorTrainer(folder, args, train_dataset=groups())
    trainer.train()
    assert "caption_loss" not in trainer.state.log_history[0]
    assert "group_loss" in trainer.state.log_history[0]


def test_evaluation_logs_under_trls_names(tmp_path):
    trainer = AestheticDiscriminatorTrainer(
        tiny_discriminator("clip"),
        config(tmp_path),
        train_dataset=groups(),
        eval_dataset=groups(seed=1),
        processing_class=tiny_processor("clip"),
    )
    metrics = trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert {"eval_accuracy", "eval_margin", "eval_top1", "eval_group_loss", "eval_caption_accuracy"} <= set(logged)
    losses = [logged[f"eval_{name}"] for name in ("group_loss", "bce_loss", "caption_loss")]
    assert metrics["eval_loss"] == pytest.approx(np.dot([1, 0.1, 0.1], losses), rel=1e-5)


# Scores


def test_scores_are_the_models_row_by_row_whatever_the_batch(tmp_path):
    data = groups()
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=3, dataloader_drop_last=True)
    scores = trainer.score(data)
    assert [len(row) for row in scores] == [3, 3, 2, 3, 3, 2, 3, 3]
    processor = tiny_processor("clip")
    for row, own in zip(data, scores, strict=True):
        inputs = processor(images=row["images"], text=[row["prompt"]] * len(row["images"]))
        with torch.no_grad():
            expected = trainer.model.eval()(**inputs).logits.squeeze(1)
        np.testing.assert_allclose(own, expected.numpy(), atol=1e-5)
    assert not trainer._metrics["eval"]


def test_scores_by_another_path_and_then_by_its_own_again(tmp_path):
    trainer = trainer_of(tmp_path, equalize_size=12, equalize_jpeg=[40, 60])
    assert trainer.evaluation_path == Equalizer(12, 50)
    own = np.concatenate(trainer.score(groups()))
    other = np.concatenate(trainer.score(groups(), Equalizer(16, None)))
    assert abs(own - other).max() > 1e-3
    np.testing.assert_array_equal(own, np.concatenate(trainer.score(groups())))
    np.testing.assert_array_equal(own, np.concatenate(trainer.score(groups(), Equalizer(12, 50))))
    plain = np.concatenate(trainer_of(tmp_path).score(groups()))
    np.testing.assert_allclose(other, plain, atol=1e-5)


# Saving and resuming


def scores_of_folder(folder):
    scorer = DiscriminatorScorer(model=str(folder), device="cpu")
    return np.concatenate([scorer.score(row["images"], [row["prompt"]] * len(row["images"])) for row in groups()])


def test_the_saved_folder_is_what_the_scorer_loads(tmp_path):
    trainer = trainer_of(tmp_path, trainable_layers="all")
    trainer.train()
    trainer.save_model()
    np.testing.assert_allclose(scores_of_folder(tmp_path), np.concatenate(trainer.score(groups())), atol=1e-5)
    assert isinstance(AestheticDiscriminatorProcessor.from_pretrained(tmp_path), AestheticDiscriminatorProcessor)


def test_a_lora_is_saved_merged_and_its_checkpoints_are_adapters(tmp_path):
    lora = LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = trainer_of(tmp_path, peft_config=lora, save_strategy="steps", save_steps=2, gradient_checkpointing=True)
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    assert any("score_head" in name for name in trainable) and any("log_scale" in name for name in trainable)
    assert not any("text_model" in name for name in trainable)
    trainer.train()
    trained = np.concatenate(trainer.score(groups()))
    trainer.save_model()
    np.testing.assert_allclose(scores_of_folder(tmp_path), trained, atol=1e-5)
    assert abs(trained - np.concatenate(trainer_of(tmp_path / "new").score(groups()))).max() > 1e-2
    np.testing.assert_array_equal(trained, np.concatenate(trainer.score(groups())))  # saving has changed nothing
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "processor_config.json"} <= files and "model.safetensors" not in files


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_same_run(tmp_path, lora):
    def run(folder, resume=None):
        trainer = trainer_of(
            folder,
            peft_config=LoraConfig(r=2) if lora else None,
            trainable_layers=None if lora else 1,
            max_steps=5,
            save_strategy="steps",
            save_steps=3,
            random_flip=True,
            equalize_jpeg=[50, 90],
        )
        trainer.train(resume_from_checkpoint=resume)
        return np.concatenate(trainer.score(groups()))

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "whole", resume=str(tmp_path / "whole/checkpoint-3"))
    np.testing.assert_allclose(resumed, whole, atol=1e-6)


def test_card_says_how_to_load_and_names_no_folder_of_this_machine(tmp_path):
    folder = save_tiny_backbone("clip", tmp_path / "backbone")
    args = config(tmp_path / "mine", patch_layer=2)
    trainer = AestheticDiscriminatorTrainer(folder, args, train_dataset=groups())
    trainer.report = {"Held-out captions": "It picks the real image."}
    trainer.create_model_card(dataset_name=str(tmp_path))
    text = (tmp_path / "mine/README.md").read_text()
    assert str(tmp_path) not in text and "license" not in text
    assert 'DiscriminatorScorer(model="mine")' in text and "`backbone`" in text
    assert "## Held-out captions\n\nIt picks the real image." in text
    assert '"patch_layer": 2' in text and "- aesthetic-discriminator" in text


# What is given


def test_model_may_be_a_folder_of_a_backbone_or_of_a_discriminator(tmp_path):
    backbone = save_tiny_backbone("siglip", tmp_path / "backbone")
    trainer = AestheticDiscriminatorTrainer(
        backbone, config(tmp_path / "a", patch_layer=2, head_hidden_size=5), train_dataset=groups()
    )
    assert trainer.model.config.patch_layer == 2 and trainer.model.score_head.hidden.out_features == 5
    trainer.save_model()
    again = AestheticDiscriminatorTrainer(str(tmp_path / "a"), config(tmp_path / "b"), train_dataset=groups())
    for (name, new), old in zip(again.model.state_dict().items(), trainer.model.state_dict().values(), strict=True):
        assert torch.equal(new, old), name
    loaded = AestheticDiscriminator.from_pretrained(tmp_path / "a")
    third = AestheticDiscriminatorTrainer(loaded, config(tmp_path / "c"), train_dataset=groups())
    assert third.processing_class.pad_to_length
    with pytest.raises(ValueError, match=r"`patch_layer=1` is for a new discriminator"):
        AestheticDiscriminatorTrainer(
            str(tmp_path / "a"), config(tmp_path / "d", patch_layer=1), train_dataset=groups()
        )


def test_digits_is_the_small_backbone_that_reads_captions_already(tmp_path):
    trainer = AestheticDiscriminatorTrainer("digits", config(tmp_path, trainable_layers=3), train_dataset=groups())
    assert trainer.model.backbone.vision_model.config.image_size == 16
    first, second = (digits_backbone().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    processor = digits_processor()
    texts = processor.tokenize(
        ["a red handwritten seven", "the number seven written in red", "a blue handwritten two"]
    )
    seven, same, two = trainer.model.encode_captions(**texts)
    assert seven @ same > seven @ two + 0.1  # trained contrastively
    image = PILImage.fromarray(crawl("train", 1).images[0])
    pixels = processor(images=[image])["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    np.testing.assert_array_equal(((pixels[0] * std + mean) * 255).round().permute(1, 2, 0).numpy(), np.asarray(image))


def test_wrong_arguments_are_refused(tmp_path):
    def make(model=None, args=None, **arguments):
        model = tiny_discriminator("clip") if model is None else model
        arguments = {"train_dataset": groups(), "processing_class": tiny_processor("clip")} | arguments
        return AestheticDiscriminatorTrainer(model, args or config(tmp_path), **arguments)

    with pytest.raises(ValueError, match="`data_collator` can't be replaced"):
        make(data_collator=lambda rows: rows)
    with pytest.raises(ValueError, match="`quantization_config` can't be used"):
        make(quantization_config=object())
    with pytest.raises(TypeError, match=r"`model` must be an `AestheticDiscriminator`.*got `Linear`"):
        make(model=WithConfig())
    with pytest.raises(TypeError, match="`processing_class` must be an `AestheticDiscriminatorProcessor`"):
        make(processing_class=tiny_processor("clip").tokenizer)
    with pytest.raises(ValueError, match="`model` doesn't say where it was loaded from"):
        make(processing_class=None)
    with pytest.raises(ValueError, match="`trainable_layers=2` and a LoRA both say"):
        make(args=config(tmp_path, trainable_layers=2), peft_config=LoraConfig())
    with pytest.raises(ValueError, match="`lora_task_type='SEQ_CLS'` has no meaning"):
        make(peft_config=LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        make(train_dataset=None)
    with pytest.raises(ValueError, match="The processor of the backbone '/nowhere' could not be loaded"):
        make(model="/nowhere", processing_class=None)


class WithConfig(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.config = SimpleNamespace(name_or_path="")


WithConfig.__name__ = "Linear"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 77}, "`max_length=77` has no meaning for a discriminator"),
        ({"center_rewards_coefficient": 0.01}, "see `bce_weight`"),
        ({"eos_token": "x"}, "`eos_token='x'`"),
        ({"chat_template_path": "x"}, "captions are no conversations"),
        ({"pad_to_multiple_of": 8}, "`pad_to_multiple_of=8`"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "`model_init_kwargs="),
        ({"trainable_layers": "some"}, "`trainable_layers` must be a number of layers or 'all', got 'some'"),
        ({"trainable_layers": -1}, "`trainable_layers` must be"),
        ({"patch_layer": -1}, "`patch_layer` must be at least 0"),
        ({"head_hidden_size": 0}, "`head_hidden_size` must be at least 1"),
        ({"head_dropout": 1.0}, r"`head_dropout` must be in \[0, 1\)"),
        ({"head_dropout": 0.5}, "`head_dropout=0.5` does nothing while `disable_dropout` is on"),
        ({"bce_weight": -1.0}, "`bce_weight` must be at least 0"),
        ({"caption_negative_weight": float("nan")}, "`caption_negative_weight` must be at least 0"),
        ({"text_conditioned": False, "caption_negative_weight": 0.5}, "does nothing with `text_conditioned=False`"),
        ({"test_share": 1.0}, "`test_share` must be between 0 and 1"),
        ({"equalize_size": 4}, "`equalize_size` must be at least 8"),
        ({"equalize_jpeg": [80]}, r"`equalize_jpeg` must be the lowest and the highest quality.*got \[80\]"),
        ({"equalize_jpeg": [90, 80]}, "`equalize_jpeg` must be"),
        ({"equalize_jpeg": [70, 96]}, "`equalize_jpeg` must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_good_options_pass(tmp_path):
    config(tmp_path, trainable_layers="4", head_dropout=0.1, disable_dropout=False, equalize_jpeg=[70, 70])
    assert json.loads(config(tmp_path, trainable_layers="all").to_json_string())["trainable_layers"] == "all"


# Processes


def train_and_score(folder: str, batch_size: int) -> None:
    """Four steps of four rows, whatever the number of processes; what came out is written to `folder`."""
    data = groups((3, 3, 2, 3, 3, 2, 3))  # an odd number, of which two processes see one row twice
    # The captions of one process are each other's negatives, so that loss does change with their number
    trainer = trainer_of(
        folder,
        data=data,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        dataloader_drop_last=True,
        max_steps=4,
        learning_rate=1e-3,
        caption_negative_weight=0.0,
    )
    trainer.train()
    scores = np.concatenate(trainer.score(data)).tolist()
    if trainer.accelerator.is_main_process:
        history = [log for log in trainer.state.log_history if "group_loss" in log]
        Path(folder, "seen.json").write_text(json.dumps([trainer.accelerator.num_processes, history, scores]))


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(tmp_path):
    seen = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        training.launch(__file__, processes, folder, 4 // processes)
        count, *seen[processes] = json.loads((folder / "seen.json").read_text())
        assert count == processes
    (one, scores), (two, same_scores) = seen[1], seen[2]
    assert len(one) == 4
    for first, second in zip(one, two, strict=True):
        for name in ("loss", "group_loss", "bce_loss", "accuracy", "margin", "top1", "min_reward", "max_reward"):
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-4), name
    assert len(scores) == 19
    np.testing.assert_allclose(same_scores, scores, atol=1e-4)


if __name__ == "__main__":
    train_and_score(sys.argv[1], int(sys.argv[2]))
