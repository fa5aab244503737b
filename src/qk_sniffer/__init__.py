"""qk-sniffer: the query and key vectors of every attention head, as Parquet files."""
