"""Which scheme, on this hardware, for this workload: what `quantkit advise` works out."""
