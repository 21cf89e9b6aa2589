"""A validation that can be checked by hand: the mean of all parameters.

Run by FEDn in the package's directory: validate.py <model in> <metrics out>.
"""

from __future__ import annotations

import sys

from fedn.utils.helpers.helpers import get_helper, save_metrics

model_in, metrics_out = sys.argv[1:]
layers = get_helper("numpyhelper").load(model_in)
save_metrics({"mean": sum(float(layer.sum()) for layer in layers) / sum(layer.size for layer in layers)}, metrics_out)
