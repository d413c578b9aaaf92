"""Upload to the Hub what a run has made: the adapter with its card, the dataset, the discriminator.

    trl-diffusion-rank push --adapter runs/mine/dpo --evaluation runs/mine/evaluate --hub_model_id me/mine \\
        --output_dir runs/mine/push

Each is uploaded where its id is set. The repository is put together before anything is sent, so that it can be looked
at, and stays when the Hub can't be reached: the same command again sends what is missing.

    <output_dir>/model/            as it is uploaded: weights for diffusers and for ComfyUI, samples, README.md
    <output_dir>/discriminator/    the same of the discriminator
    <output_dir>/push.json         where everything went
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_diffusion_rank.files import replace_file
from trl_diffusion_rank.options import check_at_least
from trl_diffusion_rank.processes import is_main_process
from trl_diffusion_rank.stages._common import require


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from trl_diffusion_rank.hub.cards import Sample


HELP = "upload the adapter with its card, the dataset and the discriminator to the Hub"
INPUTS = {
    "adapter": ("dpo", "cpo"),
    "evaluation": "evaluate",
    "dataset": "score",
    "discriminator": "discriminator",
}

# Images of the card are at least so many pixels wide: smaller ones are shown with every pixel repeated
SMALLEST_SAMPLE = 128


@dataclass
class PushArguments:
    """
    Arguments of the stage `push`.

    Args:
        hub_model_id, hub_dataset_id, hub_discriminator_id (`str`, *optional*):
            Where to, as `user/name`. What has no id isn't uploaded.
        adapter (`str`, *optional*):
            Folder of the trained weights; in a run the output of `dpo` or `cpo`.
        evaluation (`str`, *optional*):
            Folder of the stage `evaluate`: the card's metrics and samples.
        dataset (`str`, *optional*):
            Folder of the ranked rows; in a run the output of `score`.
        discriminator (`str`, *optional*):
            Folder of the discriminator; in a run the output of `discriminator`.
        base_model (`str`, *optional*):
            Hub id or folder of what was trained; by default what the adapter's folder says.
        license (`str`, *optional*):
            The Hub's name of the licence, such as `openrail++`; by default that in the base model's card.
        num_samples (`int`, *optional*, defaults to `4`):
            Pairs of images, base and tuned, in the card: evenly taken over the evaluation's prompts.
        hub_private_repo (`bool`, *optional*):
            Whether a new repository is private; your organisation's default when unset.
        output_dir (`str`, *optional*):
            Folder where the repositories are put together.
    """

    hub_model_id: str | None = field(default=None, metadata={"help": "Where the adapter goes, as user/name."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Where the dataset goes, as user/name."})
    hub_discriminator_id: str | None = field(
        default=None, metadata={"help": "Where the discriminator goes, as user/name."}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "Folder of the trained weights; in a run the output of `dpo` or `cpo`."}
    )
    evaluation: str | None = field(
        default=None, metadata={"help": "Folder of the stage `evaluate`: the card's metrics and samples."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Folder of the ranked rows; in a run the output of `score`."}
    )
    discriminator: str | None = field(
        default=None, metadata={"help": "Folder of the discriminator; in a run the output of `discriminator`."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of what was trained; the adapter's folder says when unset."}
    )
    license: str | None = field(
        default=None, metadata={"help": "The Hub's name of the licence; the base model's when unset."}
    )
    num_samples: int = field(default=4, metadata={"help": "Pairs of images, base and tuned, in the card."})
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private; the owner's default when unset."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder where the repositories are put together before they are sent."}
    )

    def __post_init__(self) -> None:
        from trl_diffusion_rank.hub.upload import check_repo_id

        if not self.targets:
            raise ValueError(
                "Nothing to push: set `hub_model_id`, `hub_dataset_id` or `hub_discriminator_id` to user/name."
            )
        for option, (repo_id, source) in self.targets.items():
            check_repo_id(option, repo_id)
            if getattr(self, source) is None:
                raise ValueError(f"`{option}` is {repo_id!r} and `{source}` is not set: say which folder to push.")
        check_at_least(0, num_samples=self.num_samples)

    @property
    def targets(self) -> dict[str, tuple[str, str]]:
        """Option -> the repository, and the option that names its source; without those that aren't uploaded."""
        sources = {"hub_model_id": "adapter", "hub_dataset_id": "dataset", "hub_discriminator_id": "discriminator"}
        return {option: (getattr(self, option), source) for option, source in sources.items() if getattr(self, option)}


def argument_classes() -> tuple[type, ...]:
    return (PushArguments,)


def main(args: PushArguments) -> None:
    require("push", output_dir=args.output_dir)
    if not is_main_process():
        return
    from trl_diffusion_rank.data.artefact import push_dataset
    from trl_diffusion_rank.hub.cards import DISCRIMINATOR_FILES
    from trl_diffusion_rank.hub.upload import check_login, upload

    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for option, (_, source) in args.targets.items():
        if not Path(getattr(args, source)).is_dir():
            raise ValueError(f"`{source}` is {getattr(args, source)!r}, which is no folder; `{option}` needs it.")
    if args.hub_model_id:
        assemble_model(args, output / "model")
        print(f"The model's repository is put together in {output / 'model'}")
    if args.hub_discriminator_id:
        assemble_discriminator(args, output / "discriminator")
    print(f"Logged in to the Hub as {check_login()}")

    pushed: dict[str, Any] = dict.fromkeys(("model", "dataset", "discriminator"))
    # The model's card links the dataset, which therefore goes first
    if args.hub_dataset_id:
        commit = push_dataset(args.dataset, args.hub_dataset_id, args.hub_private_repo)
        note(output, pushed, "dataset", args.hub_dataset_id, commit)
    if args.hub_discriminator_id:
        commit = upload(
            output / "discriminator",
            args.hub_discriminator_id,
            option="hub_discriminator_id",
            private=args.hub_private_repo,
            allow_patterns=DISCRIMINATOR_FILES,
        )
        note(output, pushed, "discriminator", args.hub_discriminator_id, commit)
    if args.hub_model_id:
        commit = upload(
            output / "model",
            args.hub_model_id,
            private=args.hub_private_repo,
            allow_patterns=["*"],
            delete_patterns=["samples/*"],
        )
        note(output, pushed, "model", args.hub_model_id, commit)


def note(output: Path, pushed: dict[str, Any], what: str, repo_id: str, commit: CommitInfo) -> None:
    """Write down, and say, that one of the repositories is complete."""
    pushed[what] = {"repo_id": repo_id, "url": str(commit.repo_url), "commit": commit.oid}
    replace_file(output / "push.json", json.dumps(pushed, indent=2) + "\n")
    print(f"Pushed the {what} to {commit.repo_url}")


# The model


def assemble_model(args: PushArguments, folder: Path) -> None:
    """Put the model's repository together: weights in both key formats, samples, the card."""
    from trl_diffusion_rank.hub.comfy import SUFFIX, WEIGHTS, save_comfy_lora_if_possible

    adapter = Path(args.adapter)
    denoiser = denoiser_of(adapter)
    base_model = args.base_model or base_model_of(adapter)
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    comfy = None
    if denoiser is None:
        check_weights(adapter / WEIGHTS)
        shutil.copy2(adapter / WEIGHTS, unfinished)
        comfy = unfinished / f"{args.hub_model_id.split('/')[-1]}{SUFFIX}"
        made_in_training = adapter / f"{adapter.resolve().name}{SUFFIX}"
        if made_in_training.is_file():
            shutil.copy2(made_in_training, comfy)
        else:
            save_comfy_lora_if_possible(unfinished / WEIGHTS, base_model, comfy)
    else:
        shutil.copytree(adapter / denoiser[0], unfinished / denoiser[0])
    if (adapter / "discriminator").is_dir():  # trained beside it
        shutil.copytree(adapter / "discriminator", unfinished / "discriminator")
    card = model_card(args, unfinished, base_model, denoiser, comfy.name if comfy and comfy.is_file() else None)
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def denoiser_of(adapter: Path) -> tuple[str, str] | None:
    """Name and class of the denoiser whose weights are all in the folder; None where it holds a LoRA."""
    from trl_diffusion_rank.hub.comfy import WEIGHTS

    if (adapter / WEIGHTS).is_file():
        return None
    for name in ("unet", "transformer"):
        config = adapter / name / "config.json"
        if config.is_file():
            return name, json.loads(config.read_text())["_class_name"]
    raise ValueError(
        f"`adapter` is {str(adapter)!r}, which holds neither {WEIGHTS} nor a folder unet or transformer: give the "
        "output folder of `dpo` or `cpo`."
    )


def base_model_of(adapter: Path) -> str:
    """What was trained: as the stage's record has it, or the card that the trainer wrote."""
    record, data = record_of(adapter), _training_card(adapter)[0]
    base_model = record.get("options", {}).get("model_name_or_path") or data.get("base_model")
    if not base_model:
        raise ValueError(
            f"{adapter} doesn't say what was trained: give the base model's Hub id or folder, --base_model."
        )
    return base_model


def record_of(folder: Path) -> dict[str, Any]:
    """The `stage.json` of a stage's output; empty for a folder that no stage has made."""
    path = folder / "stage.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _training_card(adapter: Path) -> tuple[Mapping[str, Any], str | None]:
    """Metadata and introduction of the card that the trainer wrote; empty and None if it didn't."""
    from huggingface_hub import ModelCard

    if not (adapter / "README.md").is_file():
        return {}, None
    card = ModelCard.load(adapter / "README.md")
    paragraphs = [text.strip() for text in card.text.split("\n\n") if text.strip()]
    return card.data.to_dict(), next((text for text in paragraphs if not text.startswith(("#", "`", "|"))), None)


def check_weights(file: Path) -> None:
    """Refuse a LoRA file that isn't whole or holds numbers that aren't finite, before others download it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} can't be read as safetensors ({error}): train again, or give another folder."
        ) from error
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{len(broken)} of the weights in {file} are not finite, {broken[0]} for one.")


def model_card(
    args: PushArguments, folder: Path, base_model: str, denoiser: tuple[str, str] | None, comfy_file: str | None
) -> str:
    """The README; writes the samples it shows to `folder`."""
    from trl_diffusion_rank.hub.cards import (
        DiffusionCard,
        evaluation_results,
        introduction,
        license_of,
        training_sections,
    )

    adapter = Path(args.adapter)
    data, text = _training_card(adapter)
    card = DiffusionCard(
        name=args.hub_model_id,
        base_model=base_model,
        denoiser=denoiser,
        introduction=text or introduction(base_model, denoiser is None),
        tags=data.get("tags") or ["trl-diffusion-rank"],
        comfy_file=comfy_file,
        dataset=args.hub_dataset_id or record_of(adapter).get("options", {}).get("dataset_name"),
        license={"license": args.license} if args.license else license_of(base_model),
    )
    if not card.license:
        print(f"The licence of {base_model!r} isn't known: the card has none. Set `license` to say it.")
    if args.evaluation is not None:
        metrics = json.loads(Path(args.evaluation, "metrics.json").read_text(encoding="utf-8"))
        name = evaluated_adapter(metrics, adapter)
        card.results = evaluation_results(metrics, name)
        card.call = sampling_of(metrics)
        card.samples = save_samples(Path(args.evaluation), name, metrics, args.num_samples, folder / "samples")
        card.sections["Evaluation"] = evaluation_text(Path(args.evaluation), metrics)
    record = record_of(adapter)
    if record:
        card.sections |= training_sections(record, adapter.parent / "recipe.yaml")
    return str(card.render())


def evaluated_adapter(metrics: dict[str, Any], adapter: Path) -> str:
    """What the evaluation calls the adapter: by its folder's name, or as the only one."""
    names = metrics["adapters"]
    if adapter.name in names:
        return adapter.name
    if len(names) == 1:
        return names[0]
    raise ValueError(
        f"`evaluation` compares the adapters {', '.join(names)}, none of which is called {adapter.name!r}, the folder "
        "of `adapter`: give the evaluation of this adapter, or leave it out."
    )


def sampling_of(metrics: dict[str, Any]) -> dict[str, Any]:
    """How the evaluation's pictures with the most steps were drawn, as arguments of a pipeline."""
    options = metrics["options"]
    call = {"num_inference_steps": max(options["num_inference_steps"]), "guidance_scale": options["guidance_scale"]}
    return {name: value for name, value in call.items() if value is not None}


def save_samples(evaluation: Path, name: str, metrics: dict[str, Any], count: int, folder: Path) -> list[Sample]:
    """
    Pairs of the evaluation's images, evenly taken over its prompts and not chosen, as files.

    Args:
        evaluation: the stage's folder, whose dataset has a row an image.
        name: the adapter, as its column `model` has it.
        count: how many pairs.
        folder: where they are written.
    """
    import numpy as np

    from trl_diffusion_rank.data.loading import load_splits
    from trl_diffusion_rank.hub.cards import Sample

    (data,) = load_splits(str(evaluation)).values()
    keys = data.select_columns(["prompt", "row", "index", "num_inference_steps", "model"]).to_dict()
    steps = max(metrics["options"]["num_inference_steps"])
    rows: dict[str, int] = {}  # of each prompt the first
    places: dict[tuple[int, str], int] = {}
    for place, (prompt, row, index, drawn_in, model) in enumerate(zip(*keys.values(), strict=True)):
        if index == 0 and drawn_in == steps and model in ("base", name):
            rows.setdefault(prompt, row)
            places[row, model] = place
    prompts = list(rows)
    chosen = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int).tolist()
    folder.mkdir()
    samples = []
    for number, prompt in enumerate(prompts[place] for place in chosen):
        files = {}
        for model, label in (("base", "base"), (name, "tuned")):
            files[label] = f"samples/{number}-{label}.png"
            _visible(data[places[rows[prompt], model]]["image"]).save(folder / Path(files[label]).name)
        samples.append(Sample(prompt, **files))
    return samples


def _visible(image: Any) -> Any:
    """An image with every pixel repeated until it is wide enough to be seen on a page."""
    factor = -(-SMALLEST_SAMPLE // image.width)
    return image.resize((image.width * factor, image.height * factor), resample=0)


def evaluation_text(evaluation: Path, metrics: dict[str, Any]) -> str:
    """The evaluation's tables, and what it warns of."""
    text = (evaluation / "table.md").read_text(encoding="utf-8").strip()
    if metrics["warnings"]:
        text += "\n\nTo be read with care:\n\n" + "\n".join(f"* {warning}" for warning in metrics["warnings"])
    return text


# The discriminator


def assemble_discriminator(args: PushArguments, folder: Path) -> None:
    """Put the discriminator's repository together: its files, and its card with the new name and the metrics."""
    from fnmatch import fnmatch

    from huggingface_hub import ModelCard

    from trl_diffusion_rank.hub.cards import DISCRIMINATOR_FILES, discrimination_results, license_of, renamed

    source = Path(args.discriminator)
    if not (source / "README.md").is_file() or not (source / "config.json").is_file():
        raise ValueError(
            f"`discriminator` is {args.discriminator!r}, which is no output of the stage `discriminator`: it has no "
            "README.md or no config.json."
        )
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in DISCRIMINATOR_FILES):
            shutil.copy2(file, unfinished)
    card = ModelCard.load(source / "README.md")
    renamed(card, args.hub_discriminator_id)
    base_model = card.data.get("base_model")
    for key, value in ({"license": args.license} if args.license else license_of(base_model)).items():
        card.data[key] = value
    if (source / "metrics.json").is_file():
        metrics = json.loads((source / "metrics.json").read_text(encoding="utf-8"))
        card.data["model_name"] = args.hub_discriminator_id.split("/")[-1]
        card.data["eval_results"] = discrimination_results(metrics)
    (unfinished / "README.md").write_text(str(card), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("push")
