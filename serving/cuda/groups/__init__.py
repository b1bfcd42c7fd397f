"""One model over several cards in one process: tensor-parallel and data-parallel attention, FFNs cut by width."""
