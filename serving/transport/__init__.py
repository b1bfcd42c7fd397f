"""Transports of hidden rows between pools that share no memory. Within a host the mailbox of `serving.shm` is the transport."""
