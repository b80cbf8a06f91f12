"""From files to batches: annotations, pictures, augmentation, order, loading."""
