import numpy as np
import pytest
from scipy import stats
from scipy.linalg import sqrtm

from trl_diffusion_rank.evaluation.statistics import (
    FrechetReference,
    bootstrap_interval,
    cohens_dz,
    cohens_h,
    diversity,
    frechet_distance,
    group_diversity,
    percentile_interval,
    resample_indices,
    resampled_means,
    sign_test,
    win_rate,
)


def test_win_rate_counts_ties_one_half():
    # one win, one loss, two ties: (1 + 0 + 1/2 + 1/2) / 4
    assert win_rate(np.array([2, 0, 1, 1]), np.array([1, 1, 1, 1])) == 0.5
    assert win_rate(np.array([1.0, 1.0]), np.array([0.0, 1.0])) == 0.75


def test_cohens_h():
    # shares 3/4 and 1/4: arcsin sqrt is pi/3 and pi/6, so h = 2 (pi/3 - pi/6) = pi/3
    assert cohens_h(np.array([1, 1, 1, 0]), np.array([0, 0, 0, 1])) == pytest.approx(np.pi / 3)
    assert cohens_h(np.array([0, 1]), np.array([1, 0])) == 0


def test_cohens_dz_is_the_paired_t_over_the_root_of_n():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 30), rng.normal(0, 1, 30)
    assert cohens_dz(a, b) == pytest.approx(stats.ttest_rel(a, b).statistic / np.sqrt(30))


def test_cohens_dz_without_variation():
    assert cohens_dz(np.ones(1), np.ones(1)) == 0
    assert cohens_dz(np.ones(3), np.ones(3)) == 0
    assert cohens_dz(np.ones(3), np.zeros(3)) == np.inf
    assert cohens_dz(np.zeros(3), np.ones(3)) == -np.inf


def test_sign_test():
    # 7 wins, 1 loss, 2 ties: 2 (C(8,0) + C(8,1)) / 2^8 = 18 / 256
    a = np.array([1] * 7 + [0] + [1, 1])
    b = np.array([0] * 7 + [1] + [1, 1])
    assert sign_test(a, b) == pytest.approx(18 / 256)
    assert sign_test(b, a) == pytest.approx(18 / 256)
    assert sign_test(np.ones(4), np.ones(4)) == 1


def test_bootstrap_interval_of_a_mean_agrees_with_scipy():
    values = np.random.default_rng(1).exponential(size=80)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert bootstrap_interval(values, num_resamples=4000) == pytest.approx(tuple(theirs), abs=0.02)


def test_bootstrap_interval_is_reproducible_and_depends_on_its_seed():
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_resampling_draws_whole_clusters():
    clusters = np.array(["b", "a", "b", "a", "c"])
    for index in resample_indices(5, clusters, num_resamples=50):
        counts = np.bincount(index, minlength=5)
        assert counts[0] == counts[2] and counts[1] == counts[3]
        assert counts[0] + counts[1] + counts[4] == 3  # three clusters are drawn


def test_clusters_of_one_are_no_clusters():
    plain = resample_indices(6, None, num_resamples=4, seed=1)
    clustered = resample_indices(6, np.arange(6), num_resamples=4, seed=1)
    assert all((a == b).all() for a, b in zip(plain, clustered, strict=True))


def test_means_are_those_of_the_resampled_members():
    rng = np.random.default_rng(0)
    values, clusters = rng.normal(size=(40, 3)), rng.integers(12, size=40)
    for given in (None, clusters, np.arange(40)):
        expected = [values[index].mean(axis=0) for index in resample_indices(40, given, num_resamples=30, seed=5)]
        assert resampled_means(values, given, num_resamples=30, seed=5) == pytest.approx(np.array(expected))


def test_interval_of_a_clustered_mean_agrees_with_scipy():
    """Clusters of one size: their resampling is that of their means."""
    rng = np.random.default_rng(4)
    prompts = np.repeat(np.arange(70), 3)
    values = rng.normal(size=70)[prompts] + 0.2 * rng.normal(size=210)
    theirs = stats.bootstrap(
        (values.reshape(70, 3).mean(axis=1),), np.mean, n_resamples=4000, method="percentile", rng=rng
    ).confidence_interval
    ours = percentile_interval(resampled_means(values[:, None], prompts, num_resamples=4000)[:, 0])
    assert ours == pytest.approx(tuple(theirs), abs=0.02)
    # ... and as far from the t interval as a percentile bootstrap of 70 is
    t = stats.ttest_1samp(values.reshape(70, 3).mean(axis=1), 0).confidence_interval(0.95)
    assert ours == pytest.approx(tuple(t), abs=0.03)


def test_the_difference_that_the_sign_test_sees_is_seen_by_wilcoxon_too():
    rng = np.random.default_rng(0)
    base = rng.normal(size=60)
    tuned = base + rng.normal(0.5, 0.7, size=60)
    assert sign_test(tuned, base) == stats.binomtest(int((tuned > base).sum()), 60).pvalue < 0.01
    assert stats.wilcoxon(tuned, base).pvalue < 0.01 < min(sign_test(base, base), sign_test(-base, base))


def test_repeated_images_of_a_prompt_are_no_evidence():
    """Each value four times over: clustered, the interval stays that of the values; taken one by one it halves."""
    values = np.random.default_rng(5).normal(size=60)
    repeated, prompts = np.repeat(values, 4), np.repeat(np.arange(60), 4)

    def width(interval):
        return interval[1] - interval[0]

    honest = width(bootstrap_interval(values))
    assert width(bootstrap_interval(repeated, clusters=prompts)) == pytest.approx(honest, rel=0.1)
    assert width(bootstrap_interval(repeated)) == pytest.approx(honest / 2, rel=0.1)


@pytest.mark.parametrize("kind", ["shares", "scores", "win rate", "clustered"])
def test_interval_of_a_null_comparison_covers_no_change(kind):
    """Two equal models, 100 times: about 95 of the intervals hold no change. Binomial(100, .95) is in 89..99 in 99 %
    of runs; more would mean that the intervals are too wide to say anything."""
    covered = 0
    for repetition in range(100):
        rng = np.random.default_rng(1000 + repetition)
        clusters, no_change = None, 0.0
        if kind == "shares":
            values = (rng.random(120) < 0.4).astype(float) - (rng.random(120) < 0.4)
        elif kind == "scores":
            values = rng.normal(size=120) - rng.normal(size=120)
        elif kind == "win rate":
            values, no_change = 0.5 + 0.5 * np.sign(rng.integers(4, size=120) - rng.integers(4, size=120)), 0.5
        else:
            clusters = np.repeat(np.arange(60), 2)
            values = rng.normal(size=60)[clusters] + 0.3 * rng.normal(size=120)
        low, high = bootstrap_interval(values, clusters=clusters, num_resamples=400, seed=repetition)
        covered += low <= no_change <= high
    assert 89 <= covered <= 99


def test_frechet_distance_against_sqrtm():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)) + 1
    b = rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_frechet_distance_by_hand():
    """In one dimension: the squared difference of means plus the squared difference of standard deviations."""
    a = np.array([[1.0], [5.0]])  # mean 3, variance 8
    b = np.array([[-1.0], [1.0]])  # mean 0, variance 2
    assert frechet_distance(a, b) == pytest.approx(9 + (np.sqrt(8) - np.sqrt(2)) ** 2)


def test_frechet_distance_with_fewer_samples_than_features():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 20))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(frechet_distance(a, rng.normal(size=(7, 20))))


def test_frechet_distance_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"shape \(4,\); \(N, d\)"):
        frechet_distance(np.ones(4), np.ones((4, 2)))
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(np.ones((4, 2)), np.ones((1, 2)))


def test_frechet_distance_of_many_samples_is_that_of_few():
    """Fewer samples than features take the other product, whose eigenvalues are the same but for zeros."""
    rng = np.random.default_rng(3)
    reference, features = rng.normal(size=(40, 6)), rng.normal(size=(5, 6)) * 2
    covariance, ref_covariance = np.cov(features, rowvar=False), np.cov(reference, rowvar=False)
    cross = 2 * sqrtm(covariance @ ref_covariance).real
    expected = ((features.mean(0) - reference.mean(0)) ** 2).sum() + np.trace(covariance + ref_covariance - cross)
    assert frechet_distance(features, reference) == pytest.approx(expected, abs=1e-6)


def test_resampled_frechet_distances_hold_the_distance():
    rng = np.random.default_rng(0)
    reference = FrechetReference(rng.normal(size=(200, 4)))
    features = rng.normal(size=(150, 4)) + 1
    resampled = reference.resampled(features)
    assert resampled.mean() == pytest.approx(reference.distance(features))  # without the bias of resampling
    low, high = percentile_interval(resampled)
    assert 0 < low < reference.distance(features) < high


def test_resampled_frechet_distances_of_pairs():
    rng = np.random.default_rng(0)
    reference = FrechetReference(rng.normal(size=(200, 4)))
    near, far = rng.normal(size=(150, 4)) + 0.3, rng.normal(size=(150, 4)) + 1
    low, high = percentile_interval(reference.resampled(near) - reference.resampled(far))
    assert low < reference.distance(near) - reference.distance(far) < high < 0


def test_frechet_interval_of_a_null_comparison_covers_no_change():
    covered = 0
    for repetition in range(100):
        rng = np.random.default_rng(repetition)
        reference = FrechetReference(rng.normal(size=(200, 3)))
        a, b = rng.normal(size=(2, 100, 3)) + 0.5
        ours, theirs = (reference.resampled(x, num_resamples=200, seed=repetition) for x in (a, b))
        low, high = percentile_interval(ours - theirs)
        covered += low <= 0 <= high
    assert 89 <= covered <= 99


def test_diversity_by_hand():
    """Group a: one pair, differing by 2 in one of two features: sqrt(4 / 2). Group b: all equal. c has one member."""
    features = np.array([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [5.0, 5.0], [9.0, 9.0]])
    groups = ["a", "a", "b", "b", "c"]
    assert group_diversity(features, groups) == pytest.approx([np.sqrt(2), 0])
    assert diversity(features, groups) == pytest.approx(np.sqrt(2) / 2)


def test_diversity_is_the_mean_over_all_pairs_of_a_group():
    from scipy.spatial.distance import pdist

    features = np.random.default_rng(0).normal(size=(7, 12))
    assert diversity(features, [0] * 7) == pytest.approx(pdist(features).mean() / np.sqrt(12))


def test_diversity_needs_a_pair():
    with pytest.raises(ValueError, match="No group has two members"):
        diversity(np.ones((2, 3)), ["a", "b"])
