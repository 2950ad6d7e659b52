"""Intervals cover the truth as often as they say, use the pairing, and do not depend on the order of anything."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from kd_lightning.pipeline import statistics
from kd_lightning.pipeline.statistics import Performance, holm
from kd_lightning.tasks import Headline

ACCURACY = Headline(name="accuracy", key="acc", units="images")
ERROR = Headline(name="mean absolute error", key="mae", units="patients", higher_is_better=False, percent=False)


def ratio(mean):
    """A headline that is no mean of units: a sum of losses by a sum of tokens, say."""
    return float(mean[0] / mean[1])


RATIO = Headline(name="bits per character", key="bpc", units="texts", percent=False, of_mean=ratio)


def of(*scores, headline=ACCURACY):
    return [Performance.of(x, headline) for x in scores]


def paired_difference(*answers):
    return statistics.paired_difference(*of(*answers))


def paired_contrast(*answers):
    return statistics.paired_contrast(*of(*answers))


def paired_p_value(*answers):
    return statistics.paired_p_value(*of(*answers))


def gap_closed(*answers):
    return statistics.gap_closed(*of(*answers))


def simulate(rng, accuracies, seeds, samples, *, seed_sd=0.006, image_sd=0.9):
    """Correct answers (seeds, samples) for each accuracy: images differ in difficulty, and so do training runs.

    The models share the images' difficulty, and each run's accuracy lies about its model's with `seed_sd`.
    """
    spread = np.sqrt(1 + image_sd**2)
    difficulty = rng.normal(0, image_sd, samples)
    answers = []
    for accuracy in accuracies:
        runs = accuracy + rng.normal(0, seed_sd if seeds > 1 else 0.0, (seeds, 1))
        skill = stats.norm.ppf(runs) * spread
        answers.append(skill - difficulty + rng.normal(0, 1, (seeds, samples)) > 0)
    return answers


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (3, 0.006), (3, 0.02), (5, 0.01)])
def test_the_interval_of_a_difference_covers_the_truth_and_is_not_absurdly_wide(seeds, seed_sd):
    rng = np.random.default_rng(seeds)
    truth, covered, widths, estimates = 0.05, 0, [], []
    for _ in range(500):
        a, b = simulate(rng, (0.80, 0.75), seeds, 400, seed_sd=seed_sd)
        interval = paired_difference(a, b)
        covered += interval.low <= truth <= interval.high
        widths.append(interval.high - interval.low)
        estimates.append(interval.mean)
    assert 0.92 <= covered / 500 <= 0.99
    # An oracle that knows the estimate's spread would need 2 * 1.96 of it; t with 2 degrees of freedom needs 2 * 4.3.
    assert 3.5 < np.median(widths) / np.std(estimates) < 8.7


def test_the_interval_of_the_share_covers_the_truth():
    rng = np.random.default_rng(0)
    covered, bounded = 0, 0
    for _ in range(300):
        (teacher,) = simulate(rng, (0.90,), 1, 600)
        alone, distilled = simulate(rng, (0.74, 0.80), 3, 600)
        share = gap_closed(teacher, alone, distilled)
        # True for this one teacher: its accuracy is 0.90, the gap 0.16, the gain 0.06.
        bounded += share.low is not None
        covered += share.low is None or share.low <= 0.06 / 0.16 <= share.high
    assert bounded == 300
    assert 0.92 <= covered / 300 <= 0.995


def test_the_formula_on_figures_worked_out_by_hand():
    a = np.array([[1, 1, 1, 0], [1, 1, 0, 1]], dtype=bool)
    b = np.array([[1, 0, 1, 0], [0, 1, 0, 0]], dtype=bool)
    # differences: [0 1 0 0], [1 0 0 1]; by seed .25, .5; by sample .5, .5, 0, .5
    v_seeds, v_samples = 0.03125 / 2, 0.0625 / 4
    df = (v_seeds + v_samples) ** 2 / (v_seeds**2 / 1 + v_samples**2 / 3)
    margin = stats.t.ppf(0.975, df) * np.sqrt(v_seeds + v_samples)
    interval = paired_difference(a, b)
    assert interval.mean == 0.375
    assert interval.low == pytest.approx(0.375 - margin)
    assert interval.high == pytest.approx(0.375 + margin)


def test_one_seed_gives_the_paired_t_test_over_samples():
    rng = np.random.default_rng(1)
    a, b = rng.random((1, 200)) < 0.8, rng.random((1, 200)) < 0.7
    reference = stats.ttest_rel(a[0].astype(float), b[0].astype(float)).confidence_interval(0.95)
    interval = paired_difference(a, b)
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high))


def test_the_same_accuracies_paired_otherwise_give_another_interval():
    a = np.arange(1000)[None] < 800
    nested = np.arange(1000)[None] < 760  # wrong wherever a is
    elsewhere = np.arange(1000)[None] >= 240  # as often right, on other images
    close, far = paired_difference(a, nested), paired_difference(a, elsewhere)
    assert close.mean == far.mean == pytest.approx(0.04)
    assert close.low > 0 > far.low


def test_pairing_of_seeds_matters():
    rng = np.random.default_rng(2)
    images = rng.random(4000)
    a = np.stack([images < level for level in (0.70, 0.75, 0.80)])
    b = np.stack([images < level - 0.01 for level in (0.70, 0.75, 0.80)])
    paired, crossed = paired_difference(a, b), paired_difference(a, b[[2, 0, 1]])
    assert paired.mean == pytest.approx(crossed.mean)
    assert paired.low > 0 > crossed.low


answers = arrays(bool, (3, 12))


@settings(max_examples=50)
@given(answers, answers, st.permutations(range(12)), st.permutations(range(3)))
def test_a_difference_swaps_its_sign_and_ignores_the_order(a, b, samples, seeds):
    one = paired_difference(a, b)
    swapped = paired_difference(b, a)
    assert (swapped.mean, swapped.low, swapped.high) == pytest.approx((-one.mean, -one.high, -one.low))
    shuffled = paired_difference(a[seeds][:, samples], b[seeds][:, samples])
    assert (shuffled.mean, shuffled.low, shuffled.high) == pytest.approx((one.mean, one.low, one.high))
    assert one.low <= one.mean <= one.high


@settings(max_examples=50)
@given(arrays(bool, (1, 12)), answers, answers, st.permutations(range(12)), st.permutations(range(3)))
def test_a_share_ignores_the_order_and_is_bounded_exactly_where_the_gap_is_shown(t, alone, distilled, samples, seeds):
    one = gap_closed(t, alone, distilled)
    shuffled = gap_closed(t[:, samples], alone[seeds][:, samples], distilled[seeds][:, samples])
    for left, right in zip(vars(one).values(), vars(shuffled).values(), strict=True):
        assert left == right or left == pytest.approx(right, abs=1e-6, rel=1e-6)
    gap = paired_difference(t, alone)
    assert (one.mean is None) == (gap.mean <= 0)
    assert (one.low is None) == (one.high is None) == (gap.low < 1e-9)
    if one.low is not None:
        assert one.low <= one.mean <= one.high


@pytest.fixture
def students():
    rng = np.random.default_rng(3)
    return simulate(rng, (0.92,), 1, 1500)[0], *simulate(rng, (0.75, 0.80), 3, 1500)


def test_the_share_is_the_set_that_the_paired_test_does_not_reject(students):
    teacher, alone, distilled = students
    share = gap_closed(teacher, alone, distilled)
    assert share.mean == pytest.approx((distilled.mean() - alone.mean()) / (teacher.mean() - alone.mean()))
    gain, gap = 1.0 * distilled - alone, 1.0 * teacher - alone

    def rejected(r):
        x = gain - r * gap
        v = np.array([x.mean(1).var(ddof=1) / 3, x.mean(0).var(ddof=1) / 1500])
        df = v.sum() ** 2 / (v[0] ** 2 / 2 + v[1] ** 2 / 1499)
        return abs(x.mean()) > stats.t.ppf(0.975, df) * np.sqrt(v.sum())

    grid = np.linspace(share.mean - 1, share.mean + 1, 2001)
    kept = [r for r in grid if not rejected(r)]
    assert share.low == pytest.approx(min(kept), abs=0.0011)
    assert share.high == pytest.approx(max(kept), abs=0.0011)


def test_a_student_that_became_the_teacher_closed_the_gap_and_one_that_stayed_closed_nothing(students):
    teacher, alone, _ = students
    whole = gap_closed(teacher, alone, np.repeat(teacher, 3, axis=0))
    assert (whole.mean, whole.low, whole.high) == pytest.approx((1, 1, 1))
    nothing = gap_closed(teacher, alone, alone)
    assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)


def test_no_share_of_a_gap_that_is_not_there(students):
    teacher, alone, distilled = students
    weak = gap_closed(~teacher, alone, distilled)
    assert (weak.mean, weak.low, weak.high) == (None, None, None)
    barely = alone[:1].copy()
    barely[0, np.flatnonzero(~barely[0])[:40]] = True
    barely[0, np.flatnonzero(alone[0])[:30]] = False
    unclear = gap_closed(barely, alone[:1], distilled[:1])
    assert unclear.mean is not None
    assert (unclear.low, unclear.high) == (None, None)


def test_one_teacher_is_compared_with_every_seed(students):
    teacher, alone, distilled = students
    repeated = np.repeat(teacher, 3, axis=0)
    assert paired_difference(teacher, alone) == paired_difference(repeated, alone)
    assert gap_closed(teacher, alone, distilled) == gap_closed(repeated, alone, distilled)


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="the same test units of both, got 10 and 11: test both networks on the same"):
        paired_difference(np.ones((3, 10), bool), np.ones((3, 11), bool))
    with pytest.raises(ValueError, match="got 3 and 2 seeds: pass the runs of the seeds that both have"):
        paired_difference(np.ones((3, 10), bool), np.ones((2, 10), bool))
    with pytest.raises(ValueError, match="1 pairs of seeds, teacher and alone 3: pass the same seeds"):
        gap_closed(np.ones((3, 10), bool), np.zeros((1, 10), bool), np.zeros((1, 10), bool))


@pytest.mark.parametrize("shape", [(10,), (3, 1), (0, 10), (3, 10, 2)])
def test_scores_that_no_mean_can_be_taken_of_are_refused(shape):
    expected = r"expected scores \(seeds, units\) on 2 or more test units for accuracy, got \("
    with pytest.raises(ValueError, match=expected):
        Performance.of(np.ones(shape), ACCURACY)


def test_a_contrast_is_the_difference_of_two_differences_and_its_interval_covers_it():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        a, b, c, d = simulate(rng, (0.80, 0.76, 0.78, 0.77), 3, 300)
        contrast = paired_contrast(a, b, c, d)
        covered += contrast.low <= 0.03 <= contrast.high
    assert contrast.mean == pytest.approx(paired_difference(a, b).mean - paired_difference(c, d).mean)
    assert 0.92 <= covered / 300 <= 1.0
    assert paired_contrast(a, b, c, c) == paired_difference(a, b)
    with pytest.raises(
        ValueError, match="expected the same seeds and units of all four, got 3 seeds, 300 units and 2 seeds, 300"
    ):
        paired_contrast(a, b, c[:2], d[:2])


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_p_is_below_a_twentieth_where_the_interval_excludes_zero(seeds):
    rng, shown = np.random.default_rng(seeds), 0
    for _ in range(100):
        a, b = simulate(rng, (0.78, 0.75), seeds, 300)
        interval, p = paired_difference(a, b), paired_p_value(a, b)
        assert (p < 0.05) == (interval.low > 0 or interval.high < 0)
        assert p == pytest.approx(paired_p_value(b, a))
        shown += p < 0.05
    assert 0 < shown < 100
    assert paired_p_value(a, a) == 1


def test_p_of_one_seed_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = simulate(rng, (0.80, 0.75), 1, 400)
    assert paired_p_value(a, b) == pytest.approx(stats.ttest_rel(a[0].astype(float), b[0].astype(float)).pvalue)


def test_holm_on_figures_worked_out_by_hand():
    # .01 · 4, .02 · 3, .03 · 2 = .06 (not below the one before), .5 · 1
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_false_discoveries_of_a_family_at_one_in_twenty():
    rng = np.random.default_rng(0)
    families = rng.uniform(size=(4000, 10))
    assert 0.04 < np.mean([min(holm(family)) < 0.05 for family in families]) < 0.06
    assert np.mean(families.min(1) < 0.05) > 0.35


def test_where_lower_is_better_an_improvement_is_a_smaller_error():
    rng = np.random.default_rng(0)
    student, distilled = rng.gamma(2, 1.0, (3, 300)), rng.gamma(2, 0.8, (3, 300))
    teacher = rng.gamma(2, 0.5, (1, 300))
    worse, better, best = of(student, distilled, teacher, headline=ERROR)
    gain = statistics.paired_difference(better, worse)
    assert gain.mean == pytest.approx(student.mean() - distilled.mean())
    assert gain.low > 0
    as_quality = paired_difference(-distilled, -student)
    assert (gain.low, gain.high) == (as_quality.low, as_quality.high)
    share = statistics.gap_closed(best, worse, better)
    assert share == gap_closed(-teacher, -student, -distilled)
    assert 0 < share.low < share.mean < share.high < 1


def corpora(rng, quality, seeds=3, texts=120, *, seed_sd=0.05):
    """Losses and lengths of texts, (seeds, texts, 2), for each quality: long texts are easier, hard texts hard for all.

    The mean loss by token, over infinitely many texts, is ``1 + E[length * difficulty] / E[length] - quality``.
    """
    length = rng.geometric(0.02, texts) + 5.0
    difficulty = rng.normal(0, 0.5, texts) - 0.004 * length
    of_each = []
    for value in quality:
        level = value + rng.normal(0, seed_sd, (seeds, 1))
        loss = length * (1 + difficulty - level + rng.normal(0, 0.3, (seeds, texts)))
        of_each.append(np.stack([loss, np.broadcast_to(length, loss.shape)], axis=-1))
    return of_each


def test_the_interval_of_a_ratio_covers_the_truth_where_a_bootstrap_over_three_seeds_does_not():
    rng = np.random.default_rng(3)
    covered, naive, runs = 0, 0, 150
    for _ in range(runs):
        a, b = corpora(rng, (0.1, 0.3))
        interval = statistics.paired_difference(*of(a, b, headline=RATIO))
        covered += interval.low <= 0.2 <= interval.high
        d = ratio_by_seed(a) - ratio_by_seed(b)
        low, high = np.percentile(rng.choice(d, (500, 3)).mean(axis=1), [2.5, 97.5])
        naive += low <= 0.2 <= high
    assert 0.92 <= covered / runs <= 0.99
    assert naive / runs < 0.85


def ratio_by_seed(scores):
    return scores[..., 0].sum(1) / scores[..., 1].sum(1)


def test_the_variance_over_units_is_that_of_resampling_them_the_same_for_both_models():
    rng = np.random.default_rng(0)
    a, b = corpora(rng, (0.1, 0.3), seeds=1)
    differences = []
    for _ in range(4000):
        drawn = rng.integers(120, size=120)
        differences.append(ratio_by_seed(a[:, drawn]) - ratio_by_seed(b[:, drawn]))
    interval = statistics.paired_difference(*of(a, b, headline=RATIO))
    assert interval.mean == pytest.approx(float((ratio_by_seed(a) - ratio_by_seed(b))[0]))
    expected = stats.t.ppf(0.975, 119) * np.std(differences) * np.sqrt(120 / 119)
    assert (interval.high - interval.low) / 2 == pytest.approx(expected, rel=0.06)
    itself = statistics.paired_difference(*of(a, a, headline=RATIO))
    assert (itself.low, itself.high) == (0, 0)
    assert statistics.paired_difference(*of(a, b, headline=RATIO)) == interval  # drawn once and for all


def test_a_bootstrap_of_a_mean_gives_the_interval_of_the_mean(students):
    _, alone, distilled = students
    resampled = Headline(name="accuracy", key="acc", units="images", of_mean=float)
    exact, close = (
        paired_difference(distilled, alone),
        statistics.paired_difference(*of(distilled, alone, headline=resampled)),
    )
    assert close.mean == pytest.approx(exact.mean)
    assert close.high - close.low == pytest.approx(exact.high - exact.low, rel=0.04)
    share, of_means = statistics.gap_closed(*of(*students, headline=resampled)), gap_closed(*students)
    assert (share.mean, share.low, share.high) == pytest.approx(
        (of_means.mean, of_means.low, of_means.high), abs=0.02 * of_means.high
    )


def test_a_resample_without_a_rare_class_does_not_spoil_the_interval():
    """The mean over classes of hits by images; one class has one image, which a third of the resamples leave out."""
    macro = Headline(
        name="macro recall", key="recall", units="images", of_mean=lambda mean: float(np.mean(mean[0] / mean[1]))
    )
    rng = np.random.default_rng(0)
    target = np.eye(3)[[*(i % 2 for i in range(199)), 2]]
    hits = [target * (rng.random((3, 200, 1)) < share) for share in (0.8, 0.6)]
    for x in hits:
        x[:, -1] = target[-1]
    with np.errstate(invalid="ignore"):
        interval = statistics.paired_difference(
            *(Performance.of(np.stack([x, np.broadcast_to(target, x.shape)], axis=2), macro) for x in hits)
        )
    assert interval.low < 2 / 3 * 0.2 < interval.high
    assert interval.high - interval.low < 0.3
