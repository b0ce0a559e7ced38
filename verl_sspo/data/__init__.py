"""From raw data sets to verl's parquet files."""
