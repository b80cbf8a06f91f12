"""Detection on images without annotations."""
