"""From latency samples to numbers that can be trusted: percentiles, an interval for a speed-up, signs of drift."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A median and the interval that holds the true one with probability `confidence`."""

    median: float
    low: float
    high: float
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class Summary:
    """Latency of one engine, in seconds.

    Attributes:
        median: Half of the samples are faster.
        p5: 5 % are faster.
        p95: 95 % are faster.
        mean: Of all samples.
        variation: Coefficient of variation (standard deviation over mean) of the samples between p5 and p95: one
            context switch among hundreds of samples says nothing about the rest.
        drift: Median of the second half of the samples over that of the first half, minus 1.
        samples: All of them, in the order of measurement.
    """

    median: float
    p5: float
    p95: float
    mean: float
    variation: float
    drift: float
    samples: tuple[float, ...]


def summarize(samples: np.ndarray) -> Summary:
    """Summary of samples [n], n ≥ 2, in seconds."""
    p5, median, p95 = (float(value) for value in np.percentile(samples, (5, 50, 95)))
    middle = samples[(samples >= p5) & (samples <= p95)]
    middle = middle if len(middle) else samples
    return Summary(
        median=median,
        p5=p5,
        p95=p95,
        mean=float(samples.mean()),
        variation=float(middle.std() / middle.mean()),
        drift=drift(samples),
        samples=tuple(samples.tolist()),
    )


def drift(samples: np.ndarray) -> float:
    """Median of the second half over the median of the first, minus 1."""
    half = len(samples) // 2
    return float(np.median(samples[half:]) / np.median(samples[:half]) - 1)


def median_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Bootstrap interval for the median of a series of measurements.

    Neighbours in time are alike (a burst of load lasts for several samples), which makes intervals from values that
    are resampled one by one too narrow. So runs of neighbours are resampled: the circular block bootstrap (Politis and
    Romano, 1992) with blocks of n^(1/3) values. Fewer than 30 values are too few for blocks.

    Args:
        values: Paired ratios [n], in the order of measurement.
        seed: Of the resampling; the same values and seed give the same interval.
    """
    n = len(values)
    # Measured coverage with n = 12: 0.85 with blocks of 2, 0.94 without. With n = 100: 0.93 and 0.94 if values are
    # independent, 0.89 and 0.78 if each keeps half of its predecessor's error.
    block = round(n ** (1 / 3)) if n >= 30 else 1
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, n, size=(_RESAMPLES, -(-n // block)))
    indices = (starts[:, :, None] + np.arange(block)).reshape(_RESAMPLES, -1)[:, :n] % n
    medians = np.median(values[indices], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians, (tail, 100 - tail))
    return Interval(float(np.median(values)), float(low), float(high))
