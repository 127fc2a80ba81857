// quantized.h - matrices of fp32 as codes and scales, and all that belongs to them into weights
//
// Included behind moe.h, by tests and benches.
#ifndef QUANTIZED_H
#define QUANTIZED_H

#if defined(__GNUC__)
#  define QUANTIZED_UNUSED __attribute__((unused))
#else
#  define QUANTIZED_UNUSED
#endif

// Sizes and memory for moe_quantize(); released by quantized_free().
static void quantized_begin(moe_quantize_desc *q, int format, int block, int scale_dtype, float *values, int64_t rows,
                            int64_t columns)
{
    const moe__scheme s = moe__weight_scheme(format, block, scale_dtype);
    const int64_t r = s.rows > 0 ? s.rows : rows, c = s.columns > 0 ? s.columns : columns;
    memset(q, 0, sizeof *q);
    q->format = format;
    q->format_block = block;
    q->scale_dtype = scale_dtype;
    q->dtype = MOE_DTYPE_F32;
    q->rows = rows;
    q->columns = columns;
    q->values = values;
    q->codes_bytes = (uint64_t)rows * (uint64_t)columns * (uint64_t)moe_dtype_bits(s.dtype) / 8;
    q->scales_bytes = (uint64_t)((rows + r - 1) / r * ((columns + c - 1) / c) * moe_dtype_bits(s.scale_dtype) / 8);
    q->codes = calloc(1, (size_t)q->codes_bytes + 1);
    q->scales = calloc(1, (size_t)q->scales_bytes + 1);
}

QUANTIZED_UNUSED static int quantized_make(moe_quantize_desc *q, int format, int block, int scale_dtype, float *values,
                                           int rows, int columns, moe_error *err)
{
    quantized_begin(q, format, block, scale_dtype, values, rows, columns);
    return moe_quantize(q, err);
}

QUANTIZED_UNUSED static void quantized_free(moe_quantize_desc *q)
{
    free(q->codes);
    free(q->scales);
}

// One part of a matrix: dims [rows, columns] where there are two.
static int set_part(moe_weights *weights, int role, int expert, int part, int dtype, int64_t rows, int64_t columns,
                    const void *data, uint64_t bytes, moe_error *err)
{
    moe_tensor t;
    memset(&t, 0, sizeof t);
    t.role = role;
    t.part = part;
    t.expert = expert;
    t.index = -1;
    t.dtype = dtype;
    t.rank = rows == 0 ? 0 : columns == 0 ? 1 : 2;
    t.dims[0] = rows;
    t.dims[1] = columns;
    t.data = data;
    t.data_bytes = bytes;
    return moe_weights_set_tensor(weights, &t, err);
}

// Codes, scales and what else the format wants. input: the static scale of NVFP4's, and of every second expert's of fp8
// per tensor; 0: none of fp8.
QUANTIZED_UNUSED static int set_quantized(moe_weights *weights, int role, int expert, moe_quantize_desc *q, float input,
                                          moe_error *err)
{
    const moe__scheme s = moe__weight_scheme(q->format, q->format_block, q->scale_dtype);
    const int64_t r = s.rows > 0 ? (q->rows + s.rows - 1) / s.rows : 0;
    const int64_t c = s.columns > 0 ? (q->columns + s.columns - 1) / s.columns : 1;
    int result = set_part(weights, role, expert, MOE_PART_DATA, s.dtype, q->rows, q->columns, q->codes, q->codes_bytes,
                          err);
    if (result != 0) return result;
    result = set_part(weights, role, expert, MOE_PART_SCALE, s.scale_dtype, r, s.columns > 0 ? c : 0, q->scales,
                      q->scales_bytes, err);
    if (result != 0) return result;
    if (moe__scheme_has_global(&s))
        result = set_part(weights, role, expert, MOE_PART_GLOBAL_SCALE, MOE_DTYPE_F32, 0, 0, &q->global_scale, 4, err);
    if (result == 0 && (q->format == MOE_FORMAT_NVFP4 ||
                        (q->format == MOE_FORMAT_FP8_PER_TENSOR && input != 0 && expert % 2 == 0)))
        result = set_part(weights, role, expert, MOE_PART_INPUT_SCALE, MOE_DTYPE_F32, 0, 0, &input, 4, err);
    return result;
}

#endif // QUANTIZED_H
