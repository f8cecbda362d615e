"""Which tokens of the depth state a process has; by default all of them."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class TokenLayout:
    """All tokens in every process.

    The layer calls these functions where a subclass that divides the tokens among processes
    (`hf_depthattn.distributed.token_shard`) has to change something:

        embeddings --own--> state --> read, norm --whole--> attention or MLP --own--> norm, write --> state
                              |
                              +--> last read --whole--> the host's final norm
    """

    def in_layer(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which a layer runs.

        Args:
            layer: the decoder layer.
        """
        return nullcontext()

    def own(self, tensor: Tensor) -> Tensor:
        """Return the tokens of this process.

        Args:
            tensor: `[B, T, D]`, equal in all processes.
        """
        return tensor

    def whole(self, tensor: Tensor, module: nn.Module | None = None) -> Tensor:
        """Return all tokens.

        Args:
            tensor: the tokens of this process.
            module: the attention or MLP module that gets the result.
        """
        return tensor

    def shared(self, tensor: Tensor) -> Tensor:
        """Return a tensor that all processes have and use with their own tokens.

        Args:
            tensor: the tensor, of any shape.
        """
        return tensor


#: The layout of a model without token sharding.
ALL_TOKENS = TokenLayout()
