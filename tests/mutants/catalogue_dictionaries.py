"""Mutants of dictionaries: training, evaluation, files; and of features as gates."""

from __future__ import annotations

from run_mutants import Mutant

TRAINING = "tests/dictionaries/test_dictionary_training.py"
GRADIENTS = (f"{TRAINING}::test_gradients_are_those_of_the_dense_formula",)
REVIVAL = (f"{TRAINING}::test_dead_features_move_to_badly_rebuilt_inputs",)
EVALUATION = (f"{TRAINING}::test_evaluation_against_plain_hooks",)
TRANSCODERS = ("tests/dictionaries/test_transcoder_training.py",)
FOLDING = (
    "tests/dictionaries/test_architectures.py::test_a_folded_scale_rebuilds_values_as_they_are",
)
SCREEN = ("tests/dictionaries/test_screen.py",)
DIVERGENCE = (f"{TRAINING}::test_the_divergence_of_one_site_is_divided_by_that_of_zeros",)
BEGINNING = (f"{TRAINING}::test_training_begins_with_the_size_that_rebuilds_best",)
RECOVERED = ("tests/dictionaries/test_recovered.py",)
FIT = ("tests/dictionaries/test_fit.py",)
LOADING = ("tests/dictionaries/test_loading.py",)
KIND = "tests/mechanisms/features/test_feature_kind.py"
ZEROS = (f"{KIND}::test_a_dictionary_of_zeros_leaves_everything_in_the_error",)
GATES = (f"{KIND}::test_gates_at_zero_put_the_reference_there",)
DETACHED = (f"{KIND}::test_a_detached_error_changes_gradients_upstream_and_no_value",)
PADDING = (f"{KIND}::test_padding_and_a_constant_first_position_are_left_out",)
SPARSE = (f"{KIND}::test_sparse_parts_are_the_dense_ones",)

MUTANTS = [
    Mutant(
        "assay/dictionaries/codes.py",
        "penalty = gates.sum() / dictionary.d_out**0.5",
        "penalty = gates.sum() / dictionary.d_in**0.5",
        GRADIENTS,
    ),
    Mutant(
        "assay/dictionaries/codes.py",
        "values = torch.relu(strength) * (taken > 0)",
        "values = torch.relu(strength)",
        GRADIENTS,
    ),
    Mutant(
        "assay/dictionaries/codes.py",
        "penalty = (open_ - near * moved).sum() / dictionary.d_out",
        "penalty = (open_ + near * moved).sum() / dictionary.d_out",
        GRADIENTS,
    ),
    Mutant(
        "assay/dictionaries/problem.py",
        "whole = sum(pieces_[1:], pieces_[0])",
        "whole = pieces_[0]",
        TRANSCODERS,
    ),
    Mutant(
        "assay/dictionaries/problem.py",
        "x = values[one.reads] / self.scales[one.reads]",
        "x = values[one.reads]",
        TRANSCODERS,
    ),
    Mutant(
        "assay/dictionaries/training.py",
        "fold_scale(one.dictionary, scales[one.reads], columns)",
        "fold_scale(one.dictionary, scales[one.reads], scales[one.writes[0]])",
        TRANSCODERS,
    ),
    Mutant(
        "assay/dictionaries/fold.py",
        "_multiply(folded.W_skip, columns / scale)",
        "_multiply(folded.W_skip, columns)",
        FOLDING,
    ),
    Mutant(
        "assay/dictionaries/screen.py",
        "    lowest = (reached - error) - UNIT * (reached - error).abs()\n",
        "    lowest = reached\n",
        SCREEN,
    ),
    Mutant(
        "assay/dictionaries/screen.py",
        "right[:, :width], right[:, width] = W_enc.T, b_enc",
        "right[:, :width], right[:, width] = W_enc.T, -b_enc",
        SCREEN,
    ),
    Mutant(
        "assay/dictionaries/sparse.py",
        "into_centre = -(W_enc @ into_bias)",
        "into_centre = W_enc @ into_bias",
        GRADIENTS,
    ),
    Mutant(
        "assay/dictionaries/problem.py",
        "loss = loss / self.zeros[place].clamp(LEAST, MOST)",
        "loss = loss / self.zeros[place].clamp(MOST, MOST)",
        DIVERGENCE,
    ),
    Mutant(
        "assay/dictionaries/initial.py",
        "dictionary.W_enc.mul_(best)",
        "dictionary.W_enc.div_(best)",
        BEGINNING,
    ),
    Mutant("assay/dictionaries/revival.py", "silent[dead] = 0", "silent[dead] += 0", REVIVAL),
    Mutant(
        "assay/dictionaries/recovered.py",
        "a = rise**2 - square * rise_square",
        "a = rise**2",
        RECOVERED,
    ),
    Mutant(
        "assay/dictionaries/recovered.py",
        "if rise <= reach * error:",
        "if rise <= 0:",
        RECOVERED,
    ),
    Mutant(
        "assay/dictionaries/recovered.py",
        "of - rise * counts",
        "of - of.mean()",
        RECOVERED,
    ),
    Mutant(
        "assay/dictionaries/evaluation.py",
        "fires = codes[kept] != 0",
        "fires = codes != 0",
        EVALUATION,
    ),
    Mutant(
        "assay/dictionaries/evaluation.py",
        "mean + (x - mean) @ basis @ basis.T",
        "x @ basis @ basis.T",
        EVALUATION,
    ),
    Mutant(
        "assay/dictionaries/fit.py",
        "if explained < 0 or dead:",
        "if explained < -10 or dead:",
        FIT,
    ),
    Mutant(
        "assay/dictionaries/load.py",
        "    if weights.scale != 1:\n",
        "    if weights.scale > 1e9:\n",
        LOADING,
    ),
    # features as gates
    Mutant(
        "assay/mechanisms/features/bound.py",
        "held = held - dictionary.encode(base.to(wide))",
        "held = held - 0 * dictionary.encode(base.to(wide))",
        GATES,
    ),
    Mutant(
        "assay/mechanisms/features/bound.py",
        "            rest = rest - base.value.to(wide)\n",
        "            rest = rest - 0 * base.value.to(wide)\n",
        ZEROS,
    ),
    Mutant(
        "assay/mechanisms/features/bound.py",
        "rebuilt = rebuilt + dictionary.b_dec[columns]",
        "rebuilt = rebuilt + 0 * dictionary.b_dec[columns]",
        GATES,
    ),
    Mutant(
        "assay/mechanisms/features/bound.py",
        "shift = total - total.detach()",
        "shift = 0 * total",
        DETACHED,
    ),
    Mutant(
        "assay/mechanisms/features/kind.py",
        "active[:, 0] = False",
        "active[:, 0] &= True",
        PADDING,
    ),
    Mutant(
        "assay/mechanisms/features/codes.py",
        "        index[0] += begin\n",
        "        index[0] += 0 * begin\n",
        SPARSE,
    ),
]
