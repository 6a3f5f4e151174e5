"""Compiled loops where numba may write nowhere; prints how many warnings there were, and the first."""

import warnings

from numba.core import caching


def none(cls, *arguments):
    return None


for locator in caching.CacheImpl._locator_classes:
    locator.from_function = classmethod(none)

from peft_read import backends  # noqa: E402 - after numba was told

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loop = backends.compiled_loop()(lambda x: x + 1)
    other = backends.compiled_loop()(lambda x: x + 2)
    with backends.compiling("a loop", loop):
        assert loop(1) == 2 and other(1) == 3
print(len(caught), caught[0].message)
