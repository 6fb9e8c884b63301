// All kernels for one instruction set; compiled several times, each time under another name.

#include "attention.h"
#include "dense.h"
#include "encoder.h"
#include "kronecker.h"
#include "lookup.h"
#include "rounding.h"
#include "sparse.h"

#define NAME(x) NAME_OF(x)
#define NAME_OF(x) #x

extern "C" const Table FACTORFORMER_VARIANT;
const Table FACTORFORMER_VARIANT = {
    NAME(FACTORFORMER_VARIANT), tiles_work, sparse, sparse_transposed, sparse_outer, chain, gelu, attention, sparse_rows, kronecker_rows,
    kronecker_few, dense_rows, extremes, round_rows, encode,
};
