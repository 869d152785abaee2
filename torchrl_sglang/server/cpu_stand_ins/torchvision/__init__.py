"""Stand-in for torchvision, whose compiled operators are built for CUDA and don't load with a CPU build of torch."""

import _stand_in

_stand_in.install(__name__, __version__="0.28.0")
