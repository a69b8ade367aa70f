"""The settings to try, from the axes of the command line."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from epg_fast.config import SweepConfig, check_sampler, check_sigma_rel

_MOST = 10_000
# Of one step: how far a range may miss its stop, as 0:1:0.3333333 does.
_TOLERANCE = Decimal("1e-5")
_NUMBER = r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"


@dataclass(frozen=True)
class Setting:
    """One of the grid: what images are drawn with. `sigma_rel` None is the checkpoint as it is."""

    sigma_rel: float | None
    steps: int
    interval: tuple[float, float]
    guidance: float


def grid(config: SweepConfig) -> list[Setting]:
    """All combinations, those of one width one after the other.

    Without guidance the interval means nothing: the first stands for all. Raises ValueError for an axis that is no
    list of numbers and ranges, is empty or has a value twice, for values that nothing can be drawn with, and for a grid
    of one setting or of too many.
    """
    widths, pairs = axis("sigma_rel", config.sigma_rel, or_null=True), intervals(config)
    for width in widths:
        if width is not None:
            check_sigma_rel(width)
    axes = widths, _steps(config), pairs, axis("guidance", config.guidance)
    if (count := math.prod(map(len, axes))) > _MOST:
        raise ValueError(f"the grid has {count} settings, want at most {_MOST}; take wider steps")
    settings = list(
        dict.fromkeys(
            Setting(width, steps, pairs[0] if scale == 1 else pair, scale)
            for width, steps, pair, scale in itertools.product(*axes)
        )
    )
    if len(settings) == 1:
        raise ValueError(
            "the grid has one setting, want two or more to compare; give an axis several values, such as --guidance "
            "1.5:4.0:0.25"
        )
    return settings


def axis(name: str, text: str, or_null: bool = False) -> list[float | None]:
    """The values of `1,1.5:4.0:0.25` in their order; with `or_null`, `null` is one, too. Raises ValueError."""
    values = []
    for word in text.strip().removeprefix("[").removesuffix("]").split(","):
        if or_null and word.strip() == "null":
            values.append(None)
            continue
        try:
            numbers = [Decimal(part.strip()) for part in word.split(":")]
            if len(numbers) not in (1, 3) or not all(number.is_finite() for number in numbers):
                raise ValueError
        except (ValueError, InvalidOperation):
            null = "null, " if or_null else ""
            raise ValueError(
                f"{name}: got {word.strip()!r}, want {null}numbers such as 1.5,2 or a range start:stop:step such as "
                "1.5:4.0:0.25"
            ) from None
        values += [float(number) for number in (_range(name, *numbers) if len(numbers) == 3 else numbers)]
    return _without_repeats(name, values)


def intervals(config: SweepConfig) -> list[tuple[float, float]]:
    """The guidance intervals (low, high) of the axes `interval`, `interval_low` and `interval_high`."""
    pairs = []
    for word in config.interval.strip().removeprefix("[").removesuffix("]").split(","):
        match = re.fullmatch(f"{_NUMBER}-{_NUMBER}", word)
        if not match:
            raise ValueError(f"interval: got {word.strip()!r}, want low-high, such as 0.19-1.61 or 0.19-1.61,0.28-2.9")
        pairs.append((float(match[1]), float(match[2])))
    _without_repeats("interval", pairs)
    ends = [config.interval_low, config.interval_high]
    if ends != [None, None]:
        if len(pairs) > 1:
            raise ValueError(
                f"interval: got {len(pairs)} of them and --interval_low or --interval_high, want pairs or ends; leave "
                "one out"
            )
        names = ("interval_low", "interval_high")
        lows, highs = (
            [given] if text is None else axis(name, text)
            for name, text, given in zip(names, ends, pairs[0], strict=True)
        )
        pairs = list(itertools.product(lows, highs))
    for low, high in pairs:
        if not low < high:
            raise ValueError(f"interval: got {low:g}-{high:g}, want low < high: guidance would never act")
    return pairs


def _steps(config: SweepConfig) -> list[int]:
    values = axis("steps", config.steps)
    for value in values:
        if value != int(value):
            raise ValueError(f"steps: got {value:g}, want integers")
    if config.sampler == "onestep":
        if len(values) > 1:
            raise ValueError(f"steps: got {len(values)} of them, but sampler onestep makes one step; leave --steps out")
        return [1]
    for value in values:
        check_sampler(config.sampler, int(value), **config.churn)
    return [int(value) for value in values]


def _range(name: str, start: Decimal, stop: Decimal, step: Decimal) -> Iterator[Decimal]:
    """start, start + step, ... up to stop, which a multiple of the step need not hit exactly."""
    if step <= 0 or stop < start:
        raise ValueError(f"{name}: got {start}:{stop}:{step}, want start <= stop and a positive step")
    count = int((stop - start) / step + _TOLERANCE) + 1
    if count > _MOST:
        raise ValueError(f"{name}: {start}:{stop}:{step} has {count} values, want at most {_MOST}; take wider steps")
    return (start + number * step for number in range(count))


def _without_repeats(name: str, values: Sequence) -> Sequence:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{name}: {shown(value)} comes twice; leave one out")
    return values


def shown(value: float | Sequence[float] | None, none: str = "null") -> str:
    """A value of an axis; `none`: what the checkpoint as it is is called."""
    if isinstance(value, list | tuple):
        return f"{value[0]:g}-{value[1]:g}"
    return none if value is None else f"{value:g}"
