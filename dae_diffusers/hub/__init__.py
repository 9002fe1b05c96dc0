"""Publishing on the Hub: what a run has left, its model card, the upload, and a page on which it can be tried."""
