"""Crosscoder features: one dictionary over the residual states of several layers, and where in
the network its gates act."""

from assay.io.files import hash_of
from assay.mechanisms.crosscoder.bind import crosscoder
from assay.mechanisms.crosscoder.coder import Crosscoder
from assay.mechanisms.crosscoder.cotraining import Cotraining, cotrain
from assay.mechanisms.crosscoder.files import load, save
from assay.mechanisms.crosscoder.gates import (
    ClampedGates,
    CrosscoderMechanisms,
    EverywhereGates,
    FirstGates,
)
from assay.mechanisms.crosscoder.initial import start_at_codes
from assay.mechanisms.crosscoder.objective import Block, Hinge, Interaction
from assay.mechanisms.crosscoder.states import read_codes, residual_states
from assay.mechanisms.crosscoder.training import Training, train, unexplained

__all__ = [
    "Block",
    "ClampedGates",
    "Cotraining",
    "Crosscoder",
    "CrosscoderMechanisms",
    "EverywhereGates",
    "FirstGates",
    "Hinge",
    "Interaction",
    "Training",
    "cotrain",
    "crosscoder",
    "hash_of",
    "load",
    "read_codes",
    "residual_states",
    "save",
    "start_at_codes",
    "train",
    "unexplained",
]
