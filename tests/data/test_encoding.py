import pytest
import torch
from tiny import ranked_dataset, tiny_sdxl_pipeline

from trl_diffusion_rank.data.collator import EncodedRowCollator, RawRowCollator
from trl_diffusion_rank.data.encoding import encode_rows, load_images, pack, unpack
from trl_diffusion_rank.data.images import to_pixels
from trl_diffusion_rank.data.ranked_rows import RankedRow, read_row, to_ranked
from trl_diffusion_rank.diffusion.families import recognise_family
from trl_diffusion_rank.objectives.ranking import win_rates


def encode(family, data, fingerprint, **kwargs):
    options = {"name": "train", "resolution": 16, "batch_size": 8, "skip_bad_rows": False}
    return encode_rows(to_ranked(data, "train"), family, fingerprint=fingerprint, **(options | kwargs))


def test_cells_hold_tensors_in_half_precision():
    tensor = torch.randn(3, 4, 2)
    assert torch.equal(unpack(pack(tensor)), tensor.half())
    ids = torch.tensor([[1024, 1365]], dtype=torch.int32)
    assert torch.equal(unpack(pack(ids)), ids)
    with pytest.raises(ValueError, match="not finite in half precision"):
        pack(torch.tensor([float("inf")]))


def test_values_beyond_float16_are_kept_in_bfloat16():
    """As the states of a T5 in bfloat16 may be; a batch of both kinds is stacked without overflow."""
    states = torch.tensor([[70000.0, -1e9], [0.1, 1e-9]]).bfloat16()
    assert torch.equal(unpack(pack(states)), states)
    assert unpack(pack(states)).dtype == torch.bfloat16
    usual = torch.tensor([[0.3, 2.0], [0.1, 1.0]]).bfloat16()
    assert unpack(pack(usual)).dtype == torch.float16
    torch.testing.assert_close(
        torch.stack([unpack(pack(states)), unpack(pack(usual))]), torch.stack([states, usual]).float()
    )
    scalar = torch.tensor(1e6)
    assert unpack(pack(scalar)).shape == ()


def test_rows_hold_latents_and_point_to_one_encoding_of_each_prompt():
    family = recognise_family(tiny_sdxl_pipeline())
    data = ranked_dataset((4, 2, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2))
    asked = []
    original = family.encode_prompts
    family.encode_prompts = lambda prompts: asked.extend(prompts) or original(prompts)
    encoded, prompts = encode(family, data, "points")
    assert len(encoded) == 14
    assert len(prompts) == len(set(data["prompt"])) == 12
    assert sorted(asked[1:]) == sorted(set(data["prompt"])), "each distinct prompt once, besides the probe for names"
    for index in (0, 2, 13):
        pixels = to_pixels(load_images(read_row(to_ranked(data, "train")[index], ""), family, 16, "").images)
        with torch.no_grad():
            expected = family.encode_images(pixels)
            embeds = original([data[index]["prompt"]])["prompt_embeds"][0]
        torch.testing.assert_close(unpack(encoded[index]["latents"]), expected.half(), rtol=2e-3, atol=2e-3)
        cell = prompts[encoded[index]["prompt_index"]]["prompt_embeds"]
        torch.testing.assert_close(unpack(cell), embeds.half(), rtol=2e-3, atol=2e-3)
        assert encoded[index]["ranks"] == data[index]["ranks"]


def test_seed_belongs_to_what_the_row_shows():
    family = recognise_family(tiny_sdxl_pipeline())
    data = ranked_dataset((2, 2, 2))
    encoded, _ = encode(family, data, "seed a")
    reversed_, _ = encode(family, data.select([2, 1, 0]), "seed b")
    assert list(reversed(reversed_["row_seed"])) == list(encoded["row_seed"])
    assert len(set(encoded["row_seed"])) == 3


def test_sizes_and_crops_reach_the_conditioning():
    family = recognise_family(tiny_sdxl_pipeline())
    from tiny import random_image

    generator = __import__("numpy").random.default_rng(0)
    row = RankedRow("a cat", [random_image(generator, (32, 16)), random_image(generator, (16, 16))], [1, 2], None)
    loaded = load_images(row, family, 16, "row")
    assert loaded.images.shape == (2, 3, 16, 16)
    assert loaded.conditioning["add_time_ids"].tolist() == [[16, 32, 0, 8, 16, 16], [16, 16, 0, 0, 16, 16]]


def test_collators_agree_and_pad_with_a_mask():
    family = recognise_family(tiny_sdxl_pipeline())
    data = ranked_dataset((4, 2))
    encoded, prompts = encode(family, data, "collate")
    collator = EncodedRowCollator()
    table = collator.add_prompts(prompts)
    batch = collator([{**row, "prompt_table": table} for row in encoded])
    raw = RawRowCollator(family, 16)([to_ranked(data, "train")[index] for index in range(2)])
    assert batch["latents"].shape == (2, 4, 4, 8, 8)
    assert raw["images"].shape == (2, 4, 3, 16, 16)
    assert batch["mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["ranks"][1, 2:].tolist() == [-1, -1]
    for key in ("ranks", "mask", "psi", "row_seeds"):
        assert torch.equal(batch[key], raw[key]), key
    assert torch.equal(batch["image_conditioning"]["add_time_ids"], raw["image_conditioning"]["add_time_ids"])
    assert batch["prompt_conditioning"]["pooled_prompt_embeds"].shape == (2, 16)
    torch.testing.assert_close(batch["psi"], win_rates(batch["ranks"], batch["mask"]))


def test_given_psi_wins_over_that_of_the_ranks():
    family = recognise_family(tiny_sdxl_pipeline())
    data = ranked_dataset((3, 2)).remove_columns("ranks").add_column("ranks", [[1, 2, 3], [1, 2]])
    data = data.add_column("psi", [[0.9, 0.4, 0.2], None])
    batch = RawRowCollator(family, 16)([to_ranked(data, "train")[index] for index in range(2)])
    torch.testing.assert_close(batch["psi"], torch.tensor([[0.9, 0.4, 0.2], [1.0, 0.0, 0.0]]))
