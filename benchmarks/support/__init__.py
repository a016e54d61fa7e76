"""What benchmarks need besides themselves: texts, and peers that are not Python's."""
