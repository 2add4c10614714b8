"""The words that options of interventions take: here apart, so that a file that names them is checked without torch."""

from typing import Literal

Mode = Literal["zero", "mean", "noise", "shuffle", "resample"]
"""What ablation puts in place of a feature."""
Extreme = Literal["per_neuron", "shared"]
"""Whose extreme activation goes to the target: each neuron's own, or that of all listed neurons of a layer."""
Clear = Literal["all", "patches", "outliers", "none"]
"""Which other tokens lose the activation."""
Start = Literal["zero", "gaussian", "mean"]
"""What a test-time register holds at first."""
Assign = Literal["all", "random"]
"""Whether each of several test-time registers takes all neurons, or each neuron goes to one of them."""
