"""Page index maintenance: summaries, clustering, changes of padding."""
