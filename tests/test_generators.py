import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_sdxl_pipeline

from trl_diffusion_rank import generators as module
from trl_diffusion_rank.diffusion.sampling import draw_batch
from trl_diffusion_rank.generators import (
    PRESETS,
    Draw,
    Generator,
    WeightsFile,
    load_generator,
    read_generators,
    read_scheduler,
)


CPU = torch.device("cpu")


def draw(pipe, **options):
    options = {"num_inference_steps": 3, "guidance_scale": 2.0} | options
    return np.asarray(draw_batch(pipe, ["a red cat"], [1], **options)[0][0]).astype(int)


# Reading


def test_importing_and_checking_needs_no_torch():
    code = (
        "import sys\n"
        "from trl_diffusion_rank.generators import read_generators\n"
        "read_generators(['mixed', {'model': 'digits', 'scheduler': 'DDIMScheduler', 'lora': 'a/b'}])\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_draws_are_named_by_model_and_steps():
    (generator,) = read_generators([{"model": "org/some-model/", "num_inference_steps": [4, 8, 8]}])
    assert generator.draws == [Draw("some-model@4", 4, 0), Draw("some-model@8", 8, 0), Draw("some-model@8", 8, 1)]


def test_a_name_is_the_source_where_there_is_one_number_of_steps():
    def sources(**entry):
        return [
            (d.source, d.index)
            for d in read_generators([{"model": "org/x", "images_per_prompt": 2, **entry}])[0].draws
        ]

    assert sources(num_inference_steps=4) == [("x@4", 0), ("x@4", 1)]
    assert sources(num_inference_steps=4, name="sdxl_t_4_coyo") == [("sdxl_t_4_coyo", 0), ("sdxl_t_4_coyo", 1)]
    assert sources(num_inference_steps=[4, 4], name="y") == [("y", 0), ("y", 1), ("y", 2), ("y", 3)]
    assert sources(num_inference_steps=[1, 4], name="y") == [("y@1", 0), ("y@1", 1), ("y@4", 0), ("y@4", 1)]


def test_presets_expand_to_entries_that_are_valid():
    for name in PRESETS:
        generators = read_generators([name])
        assert read_generators([{"preset": name}]) == generators
        assert len({draw.source for g in generators for draw in g.draws}) >= 3
        assert len({(g.height, g.width) for g in generators}) == 1  # or the ranking learns the size
        for generator in generators:
            if generator.scheduler is not None:
                read_scheduler(generator)

    (turbo,) = read_generators(["sdxl_turbo_steps"])
    assert turbo.model == "stabilityai/sdxl-turbo" and turbo.guidance_scale == 0.0
    assert [draw.source for draw in turbo.draws] == [f"sdxl-turbo@{steps}" for steps in (1, 2, 3, 4)]
    lightning = read_generators(["sdxl_lightning"])
    for generator, steps in zip(lightning, (2, 4, 8), strict=True):
        assert generator.draws == [Draw(f"sdxl-lightning@{steps}", steps, 0)]
        file = f"sdxl_lightning_{steps}step_unet.safetensors"
        assert generator.weights("unet") == WeightsFile("ByteDance/SDXL-Lightning", file)
        assert read_scheduler(generator) == (EulerDiscreteScheduler, {"timestep_spacing": "trailing"})
    assert len({(g.model, str(g.unet)) for g in read_generators(["mixed"])}) == 4


def test_what_stands_beside_a_preset_overrides_it():
    (turbo,) = read_generators(
        [{"preset": "sdxl_turbo_steps", "num_inference_steps": [1, 4], "dtype": "float16", "name": "t"}]
    )
    assert [draw.source for draw in turbo.draws] == ["t@1", "t@4"] and turbo.dtype == "float16" and turbo.height == 512
    for generator in read_generators([{"preset": "mixed", "prompt_column": "caption", "height": 768, "width": 768}]):
        assert (generator.prompt_column, generator.height) == ("caption", 768)
    assert len(read_generators(["sdxl_lightning", {"model": "digits"}])) == 4


@pytest.mark.parametrize("key", ["model", "name", "num_inference_steps", "unet"])
def test_entries_of_a_preset_are_not_made_the_same(key):
    with pytest.raises(ValueError, match=rf"`{key}` stands beside the preset 'mixed', whose 4 entries"):
        read_generators([{"preset": "mixed", key: 1}])


def test_weights_are_given_in_several_ways(tmp_path):
    (tmp_path / "a.safetensors").touch()

    def weights(value):
        return Generator("x", lora=value).weights("lora")

    assert weights("org/repo") == WeightsFile("org/repo", None)
    assert weights("org/repo/sub/b.safetensors") == WeightsFile("org/repo", "sub/b.safetensors")
    assert weights(str(tmp_path / "a.safetensors")) == WeightsFile(str(tmp_path), "a.safetensors")
    assert weights({"repo": "org/repo", "file": "b.safetensors", "weight": 1}) == (
        WeightsFile("org/repo", "b.safetensors", 1.0)
    )
    assert Generator("x").weights("lora") is None


def test_weights_on_the_hub_are_downloaded(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: asked.append(args) or "there")
    assert WeightsFile("org/repo", "b.safetensors").fetch() == "there" and asked == [("org/repo", "b.safetensors")]
    (tmp_path / "b.safetensors").touch()
    assert WeightsFile(str(tmp_path), "b.safetensors").fetch() == str(tmp_path / "b.safetensors") and len(asked) == 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "`generators` is empty.*sdxl_turbo_steps, sdxl_lightning, mixed"),
        ([], "`generators` is empty"),
        ([{"num_inference_steps": 4}], "names no `model` and no `preset`"),
        ([{"model": "x", "num_inference_step": 4}], r"has the key 'num_inference_step'.*mean 'num_inference_steps'"),
        ([{"model": "x", "num_inference_steps": 0}], r"`num_inference_steps` of the generator 'x' is \[0\]"),
        ([{"model": "x", "num_inference_steps": []}], r"`num_inference_steps` of the generator 'x' is \[\]"),
        ([{"model": "x", "num_inference_steps": [2.5]}], r"is \[2.5\]; whole numbers of at least 1"),
        ([{"model": "x", "images_per_prompt": 0}], r"`images_per_prompt` of the generator 'x' is \[0\]"),
        ([{"model": "x"}], "one image per prompt and a ranking needs at least two"),
        ([{"model": "a/x"}, {"model": "b/x"}], "both called 'x@25'; give one of them another `name`"),
        ([{"model": "x", "height": 0, "width": 8}], "`height` of the generator 'x' is 0; a number of pixels"),
        ([{"model": "x", "height": 8}], "`height` of the generator 'x' is 8 and `width` is None; set both"),
        ([{"model": "x", "guidance_scale": "2"}], "`guidance_scale` of the generator 'x' is '2'; a number"),
        ([{"model": "x", "dtype": "bf16"}], "`dtype` of the generator 'x' is 'bf16'; one of auto, float32"),
        ([{"model": "x", "scheduler": "not a class"}], "`scheduler` of the generator 'x' is 'not a class'; the name"),
        ([{"model": "x", "scheduler": {"timestep_spacing": "trailing"}}], "a mapping with the key `name`"),
        ([{"model": "x", "lora": {"file": "a.safetensors"}}], "`lora` of the generator 'x' is .* keys repo, file, w"),
        ([{"model": "x", "lora": {"repo": "a", "scale": 2}}], "`lora` of the generator 'x' is .* keys repo, file, w"),
        ([{"model": "x", "lora": {"repo": "a", "weight": "2"}}], "`weight` must be a number"),
        ([{"model": "x", "lora": {"repo": "a", "file": "a.bin"}}], r"`file` must end in \.safetensors"),
        ([{"model": "x", "unet": "org/repo"}], r"`unet` of the generator 'x' is 'org/repo'; a \.safetensors file"),
        ([{"model": "x", "unet": {"repo": "a", "file": "b.safetensors", "weight": 1}}], "keys repo, file"),
        ([{"preset": "sdxl_lightening"}], "is the preset 'sdxl_lightening'.*Did you mean 'sdxl_lightning'"),
        (["digits"], r"the preset 'digits', which is not known.*A model is given as {model: digits}"),
    ],
)
def test_wrong_entries_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        read_generators(entries)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (4, "An entry of `generators` is 4; it must be a mapping with the key `model`, or a preset: sdxl_turbo"),
        ({"model": 4}, "`model` of a generator is 4; a text is expected"),
        ({"model": ""}, "`model` of a generator is ''; a text is expected"),
        ({"model": "x", "name": 4}, "`name` of a generator is 4; a text is expected"),
        ({"model": "x", "prompt_column": None}, "`prompt_column` of a generator is None; a text"),
        ({"model": "x", "negative_prompt": ["ugly"]}, r"`negative_prompt` of a generator is \['ugly'\]"),
    ],
)
def test_entries_of_a_wrong_type_are_refused(entry, message):
    with pytest.raises(TypeError, match=message):
        read_generators([entry])


def test_the_real_image_counts_and_has_its_name():
    assert len(read_generators([{"model": "x"}], include_real=True)) == 1
    read_generators([{"model": "x", "name": "real", "images_per_prompt": 2}])
    with pytest.raises(ValueError, match=r"both called 'real' \(the dataset's own image is called that\)"):
        read_generators([{"model": "x", "name": "real"}], include_real=True)


def test_generators_are_json():
    """The card and the fingerprint are made of them."""
    for generator in read_generators(list(PRESETS)[:2]):
        assert Generator(**json.loads(json.dumps(asdict(generator)))).draws[0].steps == generator.draws[0].steps


# Loading


def test_load(sdxl_folder):
    pipe = load_generator(Generator(sdxl_folder), CPU)
    assert pipe.dtype == torch.float32 and pipe._progress_bar_config == {"disable": True}
    assert load_generator(Generator(sdxl_folder, dtype="bfloat16"), CPU, "float32").dtype == torch.bfloat16
    assert load_generator(Generator(sdxl_folder), CPU, "float16").dtype == torch.float16


def test_the_revision_and_variant_are_passed_on(monkeypatch):
    def load_pipeline(model, dtype, **options):
        raise ValueError(f"{model} {dtype} {options}")

    monkeypatch.setattr("trl_diffusion_rank.diffusion.loading.load_pipeline", load_pipeline)
    with pytest.raises(ValueError, match=r"org/x float32 {'revision': 'v1', 'variant': 'fp16'}"):
        load_generator(Generator("org/x", revision="v1", variant="fp16"), CPU)
    with pytest.raises(ValueError, match=r"org/x float32 {}"):
        load_generator(Generator("org/x"), CPU)


def test_the_scheduler_is_applied(sdxl_folder):
    own = load_generator(Generator(sdxl_folder), CPU)
    lcm = load_generator(Generator(sdxl_folder, scheduler="LCMScheduler"), CPU)
    assert type(lcm.scheduler) is LCMScheduler
    options = {"name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "prediction_type": "v_prediction"}
    euler = load_generator(Generator(sdxl_folder, scheduler=options), CPU)
    assert type(euler.scheduler) is EulerDiscreteScheduler
    assert euler.scheduler.config.timestep_spacing == "leading"  # the model's own is trailing
    assert euler.scheduler.config.prediction_type == "v_prediction"
    assert euler.scheduler.config.beta_end == own.scheduler.config.beta_end
    images = [draw(pipe) for pipe in (own, lcm, euler)]
    assert all(np.abs(a - b).max() > 1 for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("EulerDiscreteSheduler", "is 'EulerDiscreteSheduler', which is no scheduler.*mean 'EulerDiscreteScheduler'"),
        ("UNet2DConditionModel", "is 'UNet2DConditionModel', which is no scheduler of diffusers"),
        ({"name": "DDIMScheduler", "timestep_spaceing": "x"}, "option 'timestep_spaceing'.*mean 'timestep_spacing'"),
    ],
)
def test_wrong_schedulers_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        read_scheduler(Generator("x", scheduler=scheduler))


def test_negative_prompt(sdxl_folder):
    pipe = load_generator(Generator(sdxl_folder, negative_prompt="a green dog"), CPU)
    assert np.abs(draw(pipe, negative_prompt="a green dog") - draw(pipe)).max() > 1


def test_an_option_that_a_pipeline_does_not_have_is_refused(sdxl_folder, monkeypatch):
    from diffusers import StableDiffusionXLPipeline

    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", lambda self, prompt, guidance_scale=0.0: None)
    load_generator(Generator(sdxl_folder, guidance_scale=2.0), CPU)
    with pytest.raises(ValueError, match="`negative_prompt` of the generator 'x' is 'b', and StableDiffusionXLPipe"):
        load_generator(Generator(sdxl_folder, name="x", negative_prompt="b"), CPU)


# LoRA


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory):
    """A LoRA of the tiny SDXL that changes its images, in a folder as trainers leave it."""
    folder = tmp_path_factory.mktemp("lora")
    pipe = tiny_sdxl_pipeline()
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    return folder


def weights_of(pipe):
    return {name: value.float() for name, value in pipe.unet.state_dict().items()}


def test_a_lora_is_fused_with_its_weight(sdxl_folder, lora_folder):
    file = str(lora_folder / "pytorch_lora_weights.safetensors")
    base = weights_of(load_generator(Generator(sdxl_folder), CPU))
    whole = load_generator(Generator(sdxl_folder, lora=str(lora_folder)), CPU)
    assert whole.get_list_adapters() == {} and not hasattr(whole.unet, "peft_config")
    assert np.abs(draw(whole) - draw(load_generator(Generator(sdxl_folder), CPU))).max() > 1
    for lora in (file, {"repo": str(lora_folder), "file": "pytorch_lora_weights.safetensors"}):
        same = weights_of(load_generator(Generator(sdxl_folder, lora=lora), CPU))
        assert all(torch.equal(same[name], value) for name, value in weights_of(whole).items())
    half = weights_of(load_generator(Generator(sdxl_folder, lora={"repo": str(lora_folder), "weight": 0.5}), CPU))
    changed = 0
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(half[name] - base[name], (value - base[name]) / 2, atol=1e-6, rtol=1e-4)
        changed += not torch.equal(value, base[name])
    assert changed == 16  # to_q and to_v of two attentions in each of four transformer blocks


def test_in_half_precision_a_lora_stays_a_layer(sdxl_folder, lora_folder):
    pipes = [
        load_generator(
            Generator(sdxl_folder, dtype="bfloat16", lora={"repo": str(lora_folder), "weight": weight}), CPU
        )
        for weight in (0.0, 0.5, 1.0)
    ]
    layers = [pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q for pipe in pipes]
    assert [layer.scaling["lora"] for layer in layers] == [0.0, 2.0, 4.0]
    plain = draw(load_generator(Generator(sdxl_folder, dtype="bfloat16"), CPU))
    assert np.abs(draw(pipes[0]) - plain).max() <= 1 < np.abs(draw(pipes[2]) - plain).max()


def test_a_lora_that_is_none_is_refused(sdxl_folder, tmp_path):
    with pytest.raises(ValueError, match=r"`lora` of the generator 'x' is .*: no weights could be loaded"):
        load_generator(Generator(sdxl_folder, name="x", lora=str(tmp_path)), CPU)
    weights = {"unet.elsewhere.lora_A.weight": torch.ones(2, 3), "unet.elsewhere.lora_B.weight": torch.ones(3, 2)}
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"`lora` of the generator 'x' is .*other\.safetensors'"):
        load_generator(Generator(sdxl_folder, name="x", lora=str(tmp_path / "other.safetensors")), CPU)


# Other weights


@pytest.fixture(scope="module")
def unet_file(tmp_path_factory, sdxl_folder):
    """Half-precision weights of a denoiser alone, as SDXL-Lightning's are."""
    path = tmp_path_factory.mktemp("unet") / "four_steps.safetensors"
    torch.manual_seed(1)
    unet = DiffusionPipeline.from_pretrained(sdxl_folder).unet
    state = {name: (value + 0.05 * torch.randn_like(value)).half() for name, value in unet.state_dict().items()}
    save_file(state, path)
    return path


def test_a_denoiser_is_replaced(sdxl_folder, unet_file):
    base = load_generator(Generator(sdxl_folder), CPU)
    for unet in (str(unet_file), {"repo": str(unet_file.parent), "file": unet_file.name}):
        pipe = load_generator(Generator(sdxl_folder, unet=unet), CPU)
        expected = load_file(unet_file)
        assert all(torch.equal(value, expected[name].float()) for name, value in pipe.unet.state_dict().items())
    assert np.abs(draw(pipe) - draw(base)).max() > 1
    half = load_generator(Generator(sdxl_folder, unet=str(unet_file), dtype="bfloat16"), CPU)
    assert half.unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv_in.bias"), "it lacks 1, 'conv_in.bias' for one"),
        (lambda state: state.update({"vae.x": torch.ones(1)}), "it has too many 1, 'vae.x' for one"),
        (
            lambda state: state.update({"conv_in.bias": torch.ones(3)}),
            "has of another shape 1, 'conv_in.bias' for one",
        ),
    ],
)
def test_weights_must_fit_the_denoiser(sdxl_folder, unet_file, tmp_path, change, message):
    state = load_file(unet_file)
    change(state)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=rf"`unet` of the generator 'x', .*odd.safetensors, does not fit.*{message}"):
        load_generator(Generator(sdxl_folder, name="x", unet=str(tmp_path / "odd.safetensors")), CPU)


def test_weights_that_are_nowhere(sdxl_folder, monkeypatch):
    def offline(*args):
        raise OSError("Cannot reach the Hub\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(
        ValueError, match=r"`unet` of the generator 'x' is 'org/r/f.safetensors', .*\(Cannot reach the"
    ):
        load_generator(Generator(sdxl_folder, name="x", unet="org/r/f.safetensors"), CPU)


def test_the_preset_sdxl_lightning_with_a_tiny_model(monkeypatch, sdxl_folder, unet_file):
    """All that the preset asks for, on a pipeline of SDXL's classes."""
    (entry,) = [g for g in read_generators(["sdxl_lightning"]) if g.num_inference_steps == [4]]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: str(unet_file))
    values = asdict(entry) | {"model": sdxl_folder, "variant": None, "height": 16, "width": 16}
    pipe = module.load_generator(Generator(**values), CPU)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    image = draw(pipe, num_inference_steps=4, guidance_scale=0.0, height=16, width=16)
    assert image.shape == (16, 16, 3)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]  # where Lightning was distilled
