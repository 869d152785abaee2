"""Stand-in for Triton, which has no CPU back end and takes a gigabyte of disk.

SGLang defines GPU kernels with it at import time and calls two plain helpers, which this module implements.
"""

import _stand_in


def _cdiv(dividend, divisor):
    return -(dividend // -divisor)


def _next_power_of_2(number):
    return 1 << (number - 1).bit_length() if number > 0 else 1


_stand_in.install(__name__, __version__="3.7.0", cdiv=_cdiv, next_power_of_2=_next_power_of_2)
