"""The keys of the max-of-K study."""

from __future__ import annotations

from assay.io.files import existing
from assay.memory import require_memory
from assay.studies.fields import Amount, Count, Input, Name, Positive, Several, Size, StudyConfig
from assay.studies.fields import Config as Keys
from assay.studies.names import require_proof_level, require_strategy


class ModelConfig(Keys):
    """`path` is a safetensors file with the tensors of TransformerLens; without it a network of
    these sizes is trained.
    """

    path: Input | None = None
    vocabulary: Several = 64
    positions: Several = 4
    width: Size = 32


class TrainingConfig(Keys):
    steps: Count = 3000
    batch: Count = 128
    rate: Positive = 1e-3
    decay: Amount = 0.01


class ProofsConfig(Keys):
    """`strategies` are names, or none for all; `certified` writes the certificate; `float32`
    also proves the network as executed.
    """

    level: Name = "real"
    strategies: tuple[Name, ...] = ()
    certified: Name = "best"
    float32: bool = True


class Config(StudyConfig):
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    proofs: ProofsConfig = ProofsConfig()

    def require(self) -> None:
        """Refuse unknown strategies and levels, weights that are not there, and a network that does
        not fit the memory.
        """
        for name in (*self.proofs.strategies, self.proofs.certified):
            require_strategy(name)
        require_proof_level(self.proofs.level)
        if self.model.path is not None:
            existing(self.model.path)
            return
        V, K, width = self.model.vocabulary, self.model.positions, self.model.width
        # Weights, gradients and two moments in float32; then a bit per query, largest token, count
        # and token in the certificate.
        require_memory(
            16 * (2 * V + K + 4 * width) * width + V**3 * K // 8,
            f"training and proving model.vocabulary = {V}, model.positions = {K} and model.width ="
            f" {width}",
        )
