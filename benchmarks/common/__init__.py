"""What benchmarks share: results files, model shapes, timing, figures."""
