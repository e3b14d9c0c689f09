"""Making corpora: recordings (scan), the toy corpus, flite's voices, word times (align)."""
