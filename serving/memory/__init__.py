"""A device's memory: the budget every byte is charged to, pages lent from one set, and KV ranges mapped on demand."""
