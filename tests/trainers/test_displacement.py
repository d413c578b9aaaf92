from trl_diffusion_rank.trainers.displacement import DisplacementMonitor


def run(monitor, pairs):
    return [monitor.update(*pair) for pair in pairs]


def test_both_errors_rising_far_above_the_reference_are_found():
    """Means of the windows of three: .4, .6, .8."""
    pairs = [(0.2 * i, 0.05 * i) for i in range(1, 6)]
    assert run(DisplacementMonitor(3), pairs) == [False, False, False, True, True]


def test_healthy_runs_are_left_alone():
    best_improves = [(-0.01 * i, 0.05 * i) for i in range(1, 9)]
    assert not any(run(DisplacementMonitor(3), best_improves))
    a_third_above = [(0.04 * i, 0.05 * i) for i in range(1, 9)]
    assert not any(run(DisplacementMonitor(3), a_third_above))
    steady = [(0.8, 0.05)] * 8
    assert not any(run(DisplacementMonitor(3), steady))
    recovering = [(1.5 - 0.1 * i, 0.05 * i) for i in range(1, 7)]
    assert not any(run(DisplacementMonitor(3), recovering))


def test_patience_zero_never_finds_anything():
    assert not any(run(DisplacementMonitor(0), [(0.5 * i, 0.1 * i) for i in range(1, 20)]))
