"""A recurrent network for sequences of different lengths."""

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from hpclab._arguments import one_of
from hpclab.models.counts import Counts, word

CELLS = {"GRU": nn.GRU, "LSTM": nn.LSTM}


class RNN(nn.Module):
    """Classifies sequences of different lengths: a GRU or an LSTM reads each, its last state is scored.

    Sequences are packed: no step is spent on padding, so the work grows with the frames that are there, and with the
    longest sequence. A rank with longer ones has more of it, and the others wait.

    Parameters
    ----------
    channels : int, default 12
        Numbers in a frame.
    classes : int, default 9
    width : int, default 64
        Size of the state.
    cell : {"GRU", "LSTM"}, default "GRU"
        Cho et al. (2014, arXiv:1406.1078), or Hochreiter and Schmidhuber (1997), which has a third more weights.

    Raises
    ------
    ValueError
        For another cell, or a batch with an empty sequence.
    """

    def __init__(self, channels: int = 12, classes: int = 9, width: int = 64, cell: str = "GRU"):
        super().__init__()
        one_of("cell", cell, CELLS)
        self.cell = CELLS[cell](channels, width, batch_first=True)
        self.classifier = nn.Linear(width, classes)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Class scores, shape (B, classes), for padded frames, shape (B, T, channels), and lengths, shape (B,)."""
        if (empty := (lengths < 1).nonzero()).numel():
            raise ValueError(f"lengths[{empty[0].item()}] is {lengths[empty[0]].item()}; each sequence needs a frame.")
        packed = pack_padded_sequence(frames, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, state = self.cell(packed)
        last = state[0] if isinstance(state, tuple) else state  # (1, B, width), each after its own last frame
        return self.classifier(last[0])

    def counts(self, lengths: Tensor) -> Counts:
        """Parameters, operations and kept bytes of a forward pass over sequences of these lengths, by formula.

        For each frame both cells keep 7 numbers a unit of the state: an LSTM its four gates, the cell before and after
        the tanh, and the state. Sequences that end before the longest leave their last states behind.

        Parameters
        ----------
        lengths : Tensor of int, shape (B,)
        """
        frames, samples = int(lengths.sum()), len(lengths)
        ended = samples - int((lengths == lengths.max()).sum())
        width, classes = self.classifier.in_features, self.classifier.out_features
        channels, gates, states = self.cell.input_size, *((4, 2) if self.cell.mode == "LSTM" else (3, 1))
        parameters = gates * width * (channels + width + 2) + classes * (width + 1)
        flops = frames * 2 * gates * width * (channels + width) + samples * 2 * width * classes
        kept = frames * (channels + 7 * width) + states * ended * width + samples * width
        return Counts(parameters, flops, kept * word(self) + 8 * samples)
