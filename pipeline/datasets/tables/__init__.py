"""Tables as sources of examples: CSV and Parquet files, read a batch of rows at a time.

A table's rows come in any order, and a data set is written class by class. So a table is read twice. The first time
finds the classes, how many rows each has, and what the columns are (`scanning`). The second time writes every row to
its class's place in a file beside the data set (`sorting`), from where it is read back in order. In memory are one
batch and the names of the classes, whatever the table's size; on disk is once more what the columns in use take, until
the data set is whole.
"""
