"""What is known of pages, kept up to date: summaries, clustering, padding that changes."""
