"""Making corpora: recordings (scan), the toy corpus, voices (flite, piper), word times (align)."""
