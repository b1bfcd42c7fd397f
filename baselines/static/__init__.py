"""Static partition: every model has its own weights and its own fixed share of KV on one device or several."""
