import torch

from trl_diffusion_rank.diffusion.draws import EVALUATION, draw_captions, draw_rows, stable_seed


def test_draw_belongs_to_the_row_not_to_its_place():
    shape = (4, 8, 8)
    u, noise = draw_rows(0, [11, 22, 33], 0, shape)
    u_again, noise_again = draw_rows(0, [33, 11], 0, shape)
    torch.testing.assert_close(u_again, u[[2, 0]], rtol=0, atol=0)
    torch.testing.assert_close(noise_again, noise[[2, 0]], rtol=0, atol=0)


def test_draw_changes_with_seed_row_and_visit():
    draws = [draw_rows(*key, (2,))[1] for key in ((0, [1], 0), (1, [1], 0), (0, [2], 0), (0, [1], 1))]
    draws.append(draw_rows(0, [1], EVALUATION, (2,))[1])
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_noise_is_standard_normal_and_u_uniform():
    u, noise = draw_rows(0, list(range(500)), 0, (4, 8, 8))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs(u.mean() - 0.5) < 0.05 and 0 <= u.min() and u.max() < 1


def test_captions_are_dropped_by_row_and_visit_and_never_in_evaluation():
    rows = list(range(2000))
    dropped = draw_captions(0, rows, 0, 0.1)
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(dropped[5:7], draw_captions(0, [5, 6], 0, 0.1))
    assert not torch.equal(dropped, draw_captions(0, rows, 1, 0.1))
    assert not draw_captions(0, rows, EVALUATION, 0.9).any()


def test_stable_seed_is_the_same_everywhere():
    """A literal: were it to change, caches and resumed runs would silently change with it."""
    assert stable_seed("a prompt", b"pixels", 3) == 6_170_063_932_619_133_805
    assert stable_seed("ab", "c") != stable_seed("a", "bc")
    seeds = {stable_seed(0, "a cat", index) for index in range(2000)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds), "datasets stores seeds as int64"
    assert max(seeds) > 2**62
