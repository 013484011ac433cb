"""What a person looks at before paying: samples and packs as the model will see them.

In: a source or a stage. Out: a page or lines on the terminal."""
