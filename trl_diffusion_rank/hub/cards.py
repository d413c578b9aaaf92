"""Model cards: metadata that the Hub reads, and a page on what a model is, how to use it and how good it is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from trl_diffusion_rank.data.artefact import PRIVATE, public
from trl_diffusion_rank.hub.upload import HTTPError, hub_id


@dataclass
class Sample:
    """One prompt, drawn before and after training: two files of the repository."""

    prompt: str
    base: str
    tuned: str


@dataclass
class DiffusionCard:
    """
    The card of an adapter, or of a fully trained denoiser.

    Attributes:
        name (`str`): the repository, `user/name`, or what stands for it before there is one.
        base_model (`str`): what was trained, as the user named it; of a folder only the last name is shown.
        denoiser (`tuple[str, str]`, *optional*): name and class of the denoiser where all its weights were trained,
            `("unet", "UNet2DConditionModel")`; None for a LoRA.
        introduction (`str`): how it was trained, a sentence.
        tags (`list[str]`)
        comfy_file (`str`, *optional*): the file in ComfyUI's keys.
        dataset (`str`, *optional*): Hub id of what it was trained on; anything else is left out.
        license (`dict[str, str]`): `license`, and `license_name` and `license_link` where that is `other`.
        samples (`list[Sample]`)
        results (`list[EvalResult]`)
        call (`dict`): arguments of the pipeline in the snippet, `num_inference_steps` for one.
        sections (`dict[str, str]`): further headings and their Markdown.
    """

    name: str
    base_model: str
    denoiser: tuple[str, str] | None
    introduction: str
    tags: list[str] = field(default_factory=list)
    comfy_file: str | None = None
    dataset: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    results: list[EvalResult] = field(default_factory=list)
    call: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)

    def render(self) -> ModelCard:
        body = [f"# {self.name}", self.introduction]
        if self.samples:
            text = "Base and tuned from the same noise, for prompts taken evenly over the evaluation's, not chosen."
            body += ["## Samples", text, _pairs(self.samples)]
        body += ["## Use", f"```python\n{self._snippet()}\n```"]
        if self.comfy_file:
            body.append(
                f"For ComfyUI and others that read its keys: [`{self.comfy_file}`]({self.comfy_file}) into "
                "`models/loras`, at a strength of 1."
            )
        body += [f"## {heading}\n\n{text}" for heading, text in self.sections.items()]
        return ModelCard(f"---\n{self._metadata().to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")

    def _metadata(self) -> ModelCardData:
        is_lora = self.denoiser is None
        # `template:diffusion-lora` makes the Hub show the samples as a gallery
        tags = {*self.tags, "text-to-image", *(("lora", "template:diffusion-lora") if is_lora else ())}
        base = hub_id(self.base_model)
        return ModelCardData(
            base_model=base,
            base_model_relation=base and ("adapter" if is_lora else "finetune"),
            datasets=[dataset] if (dataset := hub_id(self.dataset)) else None,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=sorted(tags),
            widget=[{"text": sample.prompt, "output": {"url": sample.tuned}} for sample in self.samples] or None,
            model_name=self.name.split("/")[-1] if self.results else None,
            eval_results=self.results or None,
            **self.license,
        )

    def _snippet(self) -> str:
        imports = ["DiffusionPipeline"] if self.base_model != "digits" else []
        if self.denoiser is not None:
            imports.append(self.denoiser[1])
        lines = [f"from diffusers import {', '.join(imports)}"] if imports else []
        load = f'DiffusionPipeline.from_pretrained("{public(self.base_model)}"'
        if self.base_model == "digits":
            lines.append("from trl_diffusion_rank import load_pipeline")
            load = 'load_pipeline("digits"'
        if self.denoiser is None:
            lines += ["", f"pipeline = {load})", f'pipeline.load_lora_weights("{self.name}")']
        else:
            name, kind = self.denoiser
            lines += ["", f'{name} = {kind}.from_pretrained("{self.name}", subfolder="{name}")']
            lines.append(f"pipeline = {load}, {name}={name})")
        prompt = self.samples[0].prompt if self.samples else "a photo of an astronaut riding a horse"
        call = [json.dumps(prompt, ensure_ascii=False), *(f"{name}={value!r}" for name, value in self.call.items())]
        return "\n".join([*lines, f"image = pipeline({', '.join(call)}).images[0]"])


def introduction(base_model: str, is_lora: bool, paper: Mapping[str, str] | None = None) -> str:
    """How a model was trained, in a sentence."""
    after = f", after [{paper['title']}](https://huggingface.co/papers/{paper['id']})" if paper else ""
    return (
        f"{'LoRA for' if is_lora else 'Fine-tuned from'} `{public(base_model)}`, trained on ranked images with "
        f"trl-diffusion-rank{after}."
    )


# Files of a discriminator's folder that make it up; `*` matches slashes too
DISCRIMINATOR_FILES = (
    *("README.md", "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("processor_config.json", "preprocessor_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json"),
    *("merges.txt", "spiece.model", "metrics.json", "table.md", "rows.png"),
)


def discriminator_card(
    *,
    name: str,
    base_model: str,
    real_source: str,
    tags: list[str],
    dataset: str | None,
    license: dict[str, str],
    options: dict[str, Any],
    sections: dict[str, str],
) -> ModelCard:
    """
    The card of an aesthetic discriminator.

    Args:
        name, base_model, dataset, license, sections: as in [`DiffusionCard`].
        real_source (`str`): what the images are called that it learnt to prefer.
        options (`dict`): how it was trained.
    """
    data = ModelCardData(
        base_model=hub_id(base_model),
        datasets=[dataset] if (dataset := hub_id(dataset)) else None,
        library_name="transformers",
        tags=sorted(tags),
        **license,
    )
    body = [
        f"# {name}",
        f"An aesthetic discriminator: how good an image is for its caption, as one number, learned from {real_source} "
        f"images beside generated ones of the same captions. Built on `{public(base_model)}` with trl-diffusion-rank.",
        "## Use",
        "```python\nfrom PIL import Image\n"
        "from trl_diffusion_rank.scorers.discriminator import DiscriminatorScorer\n\n"
        f'scorer = DiscriminatorScorer(model="{name}")\n'
        'scores = scorer.score(images=[Image.open("image.png")], prompts=["a caption"])\n'
        "print(scores)  # higher is better; 0: as likely real as not\n```",
        "`AutoModel` and `AutoProcessor` of Transformers load it too, once `trl_diffusion_rank.discriminator` is "
        "imported (`pip install trl-diffusion-rank`); no remote code is needed.",
        *(f"## {heading}\n\n{text}" for heading, text in sections.items()),
        "## How it was trained",
        "```json\n" + json.dumps(options, indent=2, default=str) + "\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


def renamed(card: ModelCard, name: str) -> None:
    """Another name in a card's title, and wherever the snippet loads the model."""
    title = next(line for line in card.text.splitlines() if line.startswith("# "))
    old = title.removeprefix("# ")
    card.text = card.text.replace(title, f"# {name}", 1).replace(f'"{old}"', f'"{name}"')


def _pairs(samples: list[Sample]) -> str:
    """Base and tuned side by side."""
    rows = ["| prompt | base | tuned |", "|---|---|---|"]
    for sample in samples:
        prompt = sample.prompt.replace("|", "\\|").replace("\n", " ")
        rows.append(f"| {prompt} | ![base]({sample.base}) | ![tuned]({sample.tuned}) |")
    return "\n".join(rows)


# What others say


@cache
def license_of(base_model: str | None) -> dict[str, str]:
    """The licence in a base model's own card, in its folder or on the Hub, as a card's metadata; empty if unknown."""
    if not base_model:
        return {}
    readme = Path(base_model, "README.md")
    try:
        if readme.is_file():
            data = ModelCard.load(readme).data.to_dict()
        elif hub_id(base_model):
            card = HfApi().model_info(base_model).card_data
            data = card.to_dict() if card is not None else {}
        else:
            return {}
    except (HTTPError, OSError, ValueError):  # no network, no such model, a card that can't be read
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


# What a card's metadata tells of a metric beside the tuned model's value
_COMPARISON = (
    *("num_inference_steps", "judge", "higher_is_better", "tuned_interval", "base", "base_interval"),
    *("difference", "difference_interval", "win_rate", "win_rate_interval"),
)


def evaluation_results(metrics: Mapping[str, Any], adapter: str) -> list[EvalResult]:
    """
    What the stage `evaluate` measured of one adapter, as a card's metadata has it: the tuned model's value, with the
    interval in the name, where the Hub shows it, and the comparison with the base model in the arguments.
    """
    dataset = str(public(metrics["options"]["dataset_name"]))
    results = []
    for result in metrics["results"]:
        if result["adapter"] != adapter or result["category"] is not None:
            continue
        low, high = result["tuned_interval"]
        steps = result["num_inference_steps"]
        name = " ".join(filter(None, (result["judge"], result["metric"])))
        results.append(
            EvalResult(
                task_type="text-to-image",
                dataset_type=dataset,
                dataset_name=f"{metrics['num_prompts']} prompts, {metrics['num_images']} images",
                dataset_split=metrics["options"].get("dataset_split"),
                metric_type=result["metric"],
                metric_name=f"{name}, {steps} steps [95 %: {low:.4g}, {high:.4g}]",
                metric_value=_rounded(result["tuned"]),
                metric_args={key: _rounded(result[key]) for key in _COMPARISON if result.get(key) is not None},
            )
        )
    return results


def discrimination_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """What the stage `discriminator` measured on held-out captions, as a card's metadata has it."""
    names = {"top1": "real image first", "auc": "AUC"}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="held-out-captions",
            dataset_name=f"{metrics['rows']} rows of {metrics['captions']} held-out captions",
            metric_type={"top1": "accuracy", "auc": "roc_auc"}[key],
            metric_name="{} [95 %: {:.4g}, {:.4g}]".format(names[key], *metrics[key]["interval"]),
            metric_value=_rounded(metrics[key]["value"]),
            metric_args={"interval": _rounded(metrics[key]["interval"]), "chance": _rounded(metrics["chance"])},
        )
        for key in names
    ]


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# What a run says of itself


def training_sections(record: Mapping[str, Any], recipe: Path) -> dict[str, str]:
    """Machine, versions and recipe of a training stage: its `stage.json`, and the run's recipe where there is one."""
    machine = record.get("hardware", {})
    names = [f"{gpu['name']} ({gpu['memory_gb']:g} GB)" for gpu in machine.get("gpus", [])]
    where = ", ".join(names) or machine.get("cpu")
    seconds = record.get("seconds")
    lines = []
    if seconds is not None:
        lines.append(f"{seconds / 60:.1f} minutes{f' on {where}' if where else ''}.")
    lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".")
    sections = {"Training": " ".join(lines)}
    content = {record["stage"]: record["options"]}
    if recipe.is_file():
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    sections["Recipe"] = f"```yaml\n{yaml_dump(_publishable(content), sort_keys=False).strip()}\n```"
    return sections


def _publishable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as the world may read it: without where things went and without folders of this machine."""
    return {
        section: {name: public(value) for name, value in (options or {}).items() if name not in PRIVATE}
        for section, options in recipe.items()
        if section != "push"
    }
