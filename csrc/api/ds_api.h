/* SPDX-License-Identifier: Apache-2.0
 *
 * The C ABI of DeepSpeed's native CPU library: the only door between Python and native code.
 *
 * Each kernel takes one pointer to a struct whose first field is the struct's size, and returns a ds_status; the
 * message of the last failure on the calling thread is in ds_last_error(). Data types are codes in the struct, never
 * part of a symbol's name. Buffers are contiguous, do not overlap, and are aligned to their element; the Python side
 * checks that, these functions check only what costs nothing. No function throws, none keeps a pointer after it
 * returned, and all may be called from several threads at once.
 */
#ifndef DS_API_H
#define DS_API_H

#include <stdint.h>

#if defined(_WIN32)
#define DS_EXPORT __declspec(dllexport)
#else
#define DS_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by one whenever a struct or a meaning changes. */
#define DS_ABI_VERSION 2

enum ds_status {
    DS_OK = 0,
    DS_BAD_STRUCT = 1, /* the struct's size is not ours: Python and library come from different versions */
    DS_BAD_VALUE = 2,  /* an argument is out of its range */
    DS_NO_MEMORY = 3,
    DS_IO_FAILED = 4 /* the system refused; its error number is in the struct */
};

enum ds_io_backend { DS_IO_AUTO = 0, DS_IO_THREADS = 1, DS_IO_URING = 2, DS_IO_IOCP = 3 };

enum ds_io_state {
    DS_IO_PENDING = 0,
    DS_IO_DONE = 1,
    DS_IO_ERROR = 2,
    DS_IO_END_OF_FILE = 3, /* the file ends before the read does */
    DS_IO_CANCELLED = 4
};

enum ds_dtype { DS_F32 = 0, DS_BF16 = 1, DS_F16 = 2, DS_F64 = 3, DS_E4M3 = 4, DS_E5M2 = 5 };

/* ---- written by op_builder/abi.py: do not edit ---- */

/* Adam and AdamW. */
typedef struct ds_adam_args {
    uint32_t size;           /* sizeof of this struct, as the caller knows it */
    uint32_t threads;        /* most threads to use, the calling one included */
    int64_t numel;           /* elements of each buffer */
    void *param;             /* updated in place */
    void *exp_avg;           /* first moment, updated in place */
    void *exp_avg_sq;        /* second moment, updated in place */
    const void *grad;        /* gradient */
    void *low;               /* also receives the new param, rounded to low_dtype; may be null */
    int32_t param_dtype;     /* ds_dtype of param */
    int32_t state_dtype;     /* ds_dtype of the moments */
    int32_t grad_dtype;      /* ds_dtype of grad */
    int32_t low_dtype;       /* ds_dtype of low */
    int32_t decoupled;       /* 1: AdamW's decay of the param; 0: decay added to the gradient */
    int32_t bias_correction; /* 1: divide the moments by 1 - beta^step */
    int32_t stochastic;      /* 1: bf16 buffers are rounded at random; param is bf16 */
    int32_t reserved;        /* 0 */
    int64_t seed;            /* of the random bits */
    int64_t step;            /* number of this step, from 1 */
    double lr;               /* learning rate */
    double beta1;            /* decay rate of the first moment */
    double beta2;            /* decay rate of the second moment */
    double eps;              /* added to the root of the second moment */
    double decay;            /* weight decay */
    double grad_scale;       /* the gradient used is grad * grad_scale */
} ds_adam_args;

/* Adagrad. */
typedef struct ds_adagrad_args {
    uint32_t size;       /* sizeof of this struct, as the caller knows it */
    uint32_t threads;    /* most threads to use, the calling one included */
    int64_t numel;       /* elements of each buffer */
    void *param;         /* updated in place */
    void *exp_avg_sq;    /* sum of squared gradients, updated in place */
    const void *grad;    /* gradient */
    void *low;           /* also receives the new param, rounded to low_dtype; may be null */
    int32_t param_dtype; /* ds_dtype of param */
    int32_t state_dtype; /* ds_dtype of the moments */
    int32_t grad_dtype;  /* ds_dtype of grad */
    int32_t low_dtype;   /* ds_dtype of low */
    double lr;           /* learning rate */
    double eps;          /* added to the root of the sum */
    double decay;        /* weight decay, added to the gradient */
    double grad_scale;   /* the gradient used is grad * grad_scale */
} ds_adagrad_args;

/* Lion. */
typedef struct ds_lion_args {
    uint32_t size;       /* sizeof of this struct, as the caller knows it */
    uint32_t threads;    /* most threads to use, the calling one included */
    int64_t numel;       /* elements of each buffer */
    void *param;         /* updated in place */
    void *exp_avg;       /* momentum, updated in place */
    const void *grad;    /* gradient */
    void *low;           /* also receives the new param, rounded to low_dtype; may be null */
    int32_t param_dtype; /* ds_dtype of param */
    int32_t state_dtype; /* ds_dtype of the moments */
    int32_t grad_dtype;  /* ds_dtype of grad */
    int32_t low_dtype;   /* ds_dtype of low */
    double lr;           /* learning rate */
    double beta1;        /* weight of the momentum in the direction */
    double beta2;        /* decay rate of the momentum */
    double decay;        /* weight decay of the param (decoupled) */
    double grad_scale;   /* the gradient used is grad * grad_scale */
} ds_lion_args;

/* SGD, with momentum or without. */
typedef struct ds_sgd_args {
    uint32_t size;       /* sizeof of this struct, as the caller knows it */
    uint32_t threads;    /* most threads to use, the calling one included */
    int64_t numel;       /* elements of each buffer */
    void *param;         /* updated in place */
    void *exp_avg;       /* momentum, updated in place; null without momentum */
    const void *grad;    /* gradient */
    void *low;           /* also receives the new param, rounded to low_dtype; may be null */
    int32_t param_dtype; /* ds_dtype of param */
    int32_t state_dtype; /* ds_dtype of the moments */
    int32_t grad_dtype;  /* ds_dtype of grad */
    int32_t low_dtype;   /* ds_dtype of low */
    int32_t nesterov;    /* 1: Nesterov's momentum */
    int32_t first;       /* 1: the momentum holds nothing yet and becomes the gradient */
    double lr;           /* learning rate */
    double momentum;     /* decay rate of the momentum */
    double dampening;    /* the momentum takes in 1 - dampening of the gradient */
    double decay;        /* weight decay, added to the gradient */
    double grad_scale;   /* the gradient used is grad * grad_scale */
} ds_sgd_args;

/* LAMB on one tensor. */
typedef struct ds_lamb_args {
    uint32_t size;           /* sizeof of this struct, as the caller knows it */
    uint32_t threads;        /* most threads to use, the calling one included */
    int64_t numel;           /* elements of each buffer */
    void *param;             /* updated in place */
    void *exp_avg;           /* first moment, updated in place */
    void *exp_avg_sq;        /* second moment, updated in place */
    const void *grad;        /* gradient */
    void *low;               /* also receives the new param, rounded to low_dtype; may be null */
    void *ratio;             /* one float: the ratio of the norms of param and update */
    int32_t param_dtype;     /* ds_dtype of param */
    int32_t state_dtype;     /* ds_dtype of the moments */
    int32_t grad_dtype;      /* ds_dtype of grad */
    int32_t low_dtype;       /* ds_dtype of low */
    int32_t eps_inside;      /* 1: eps is added before the root is taken */
    int32_t bias_correction; /* 1: scale the step by sqrt(1 - beta2^t) / (1 - beta1^t) */
    int64_t step;            /* number of this step, from 1 */
    double lr;               /* learning rate */
    double beta1;            /* decay rate of the first moment */
    double beta2;            /* decay rate of the second moment */
    double eps;              /* added to the second moment or its root */
    double decay;            /* weight decay, part of the update */
    double least;            /* least ratio */
    double most;             /* greatest ratio */
    double grad_scale;       /* the gradient used is grad * grad_scale */
} ds_lamb_args;

/* A cast. */
typedef struct ds_cast_args {
    uint32_t size;     /* sizeof of this struct, as the caller knows it */
    uint32_t threads;  /* most threads to use, the calling one included */
    int64_t numel;     /* elements of each buffer */
    const void *x;     /* the elements */
    void *out;         /* as many, in out_dtype, to nearest even */
    int32_t x_dtype;   /* ds_dtype of x */
    int32_t out_dtype; /* ds_dtype of out */
} ds_cast_args;

/* Many buffers and one flat one. */
typedef struct ds_pieces_args {
    uint32_t size;      /* sizeof of this struct, as the caller knows it */
    uint32_t threads;   /* most threads to use, the calling one included */
    int64_t pieces;     /* how many buffers */
    const void *table;  /* a row of int64 each: address, first element in flat, elements, ds_dtype */
    void *flat;         /* the flat buffer; its pieces lie in the order of the table */
    int64_t numel;      /* elements of the flat buffer */
    int32_t flat_dtype; /* ds_dtype of flat */
    int32_t scatter;    /* 1: from flat to the buffers; 0: to flat */
} ds_pieces_args;

/* Groups of values to whole numbers of few bits. */
typedef struct ds_quantize_args {
    uint32_t size;      /* sizeof of this struct, as the caller knows it */
    uint32_t threads;   /* most threads to use, the calling one included */
    int64_t groups;     /* groups, of a column each */
    int64_t group_size; /* values of a group */
    int64_t columns;    /* groups side by side; 1: the values of a group are neighbours */
    const void *x;      /* values; with null codes updated in place to what the codes stand for */
    void *codes;        /* the codes, packed; or null */
    void *scale;        /* see ds_quantize; or null */
    void *least;        /* see ds_quantize; or null */
    int32_t x_dtype;    /* ds_dtype of x */
    int32_t bits;       /* 8, 6 or 4; without codes 1 to 16 */
    int32_t asym;       /* 1: with an offset */
    int32_t weights;    /* 1: the form of weights */
    int32_t stochastic; /* 1: round at random */
    int32_t reserved;   /* 0 */
    int64_t seed;       /* of the random bits */
} ds_quantize_args;

/* The way back. */
typedef struct ds_dequantize_args {
    uint32_t size;      /* sizeof of this struct, as the caller knows it */
    uint32_t threads;   /* most threads to use, the calling one included */
    int64_t groups;     /* groups, of a column each */
    int64_t group_size; /* values of a group */
    int64_t columns;    /* groups side by side; 1: the values of a group are neighbours */
    const void *codes;  /* the codes, packed */
    const void *scale;  /* see ds_quantize */
    const void *least;  /* see ds_quantize; or null */
    void *out;          /* values */
    int32_t out_dtype;  /* ds_dtype of out */
    int32_t side_dtype; /* ds_dtype of scale and least */
    int32_t bits;       /* 8, 6 or 4 */
    int32_t asym;       /* 1: with an offset */
    int32_t weights;    /* 1: the form of weights */
    int32_t reserved;   /* 0 */
} ds_dequantize_args;

/* Groups of values to small floats. */
typedef struct ds_fp_quantize_args {
    uint32_t size;      /* sizeof of this struct, as the caller knows it */
    uint32_t threads;   /* most threads to use, the calling one included */
    int64_t groups;     /* groups */
    int64_t group_size; /* values of a group, a multiple of 4 */
    const void *x;      /* values */
    void *out;          /* packed groups, each with its scale */
    int32_t x_dtype;    /* ds_dtype of x */
    int32_t exponent;   /* bits of the exponent */
    int32_t mantissa;   /* bits of the mantissa */
    int32_t stochastic; /* 1: round at random */
    int64_t seed;       /* of the random bits */
} ds_fp_quantize_args;

/* The way back. */
typedef struct ds_fp_dequantize_args {
    uint32_t size;      /* sizeof of this struct, as the caller knows it */
    uint32_t threads;   /* most threads to use, the calling one included */
    int64_t groups;     /* groups to write */
    int64_t group_size; /* values of a group, a multiple of 4 */
    const void *packed; /* packed groups */
    void *out;          /* values */
    const void *rows;   /* int64: the rows to unpack; null for all */
    int64_t row_groups; /* groups of a row */
    int64_t there;      /* packed groups */
    int32_t out_dtype;  /* ds_dtype of out */
    int32_t exponent;   /* bits of the exponent */
    int32_t mantissa;   /* bits of the mantissa */
    int32_t reserved;   /* 0 */
} ds_fp_dequantize_args;

/* Sum of squares. */
typedef struct ds_norm_args {
    uint32_t size;    /* sizeof of this struct, as the caller knows it */
    uint32_t threads; /* most threads to use, the calling one included */
    int64_t numel;    /* elements of each buffer */
    const void *x;    /* the elements */
    void *out;        /* one double: the sum */
    int32_t x_dtype;  /* ds_dtype of x */
    int32_t reserved; /* 0 */
} ds_norm_args;

/* A queue of reads and writes. */
typedef struct ds_io_open_args {
    uint32_t size;          /* sizeof of this struct, as the caller knows it */
    int32_t backend;        /* ds_io_backend; the one in use is written here */
    int64_t block_size;     /* bytes of one transfer, 512 to 2^30 */
    int32_t queue_depth;    /* transfers under way per worker */
    int32_t workers;        /* threads; a request is cut into as many parts */
    int32_t single_submit;  /* 1: tell the system of each transfer by itself */
    int32_t overlap_events; /* 1: replace each finished transfer at once */
    int32_t direct;         /* 1: bypass the page cache where possible */
    int32_t reserved;       /* 0 */
    void *queue;            /* the queue is written here */
} ds_io_open_args;

/* One request. */
typedef struct ds_io_submit_args {
    uint32_t size;    /* sizeof of this struct, as the caller knows it */
    int32_t write;    /* 1: write, 0: read */
    void *queue;      /* the queue */
    const void *path; /* bytes (POSIX) or UTF-16 (Windows), null-terminated; or null */
    int64_t given;    /* without a path: a descriptor (POSIX) or HANDLE (Windows) */
    int64_t offset;   /* first byte in the file */
    int64_t bytes;    /* length */
    void *memory;     /* must stay until the request is over */
    int64_t ticket;   /* the number to wait by is written here */
    int32_t os_error; /* the system's error is written here */
    int32_t reserved; /* 0 */
} ds_io_submit_args;

/* The end of one request. */
typedef struct ds_io_wait_args {
    uint32_t size;      /* sizeof of this struct, as the caller knows it */
    int32_t timeout_ms; /* at most so long; negative: until it is over */
    void *queue;        /* the queue */
    int64_t ticket;     /* of ds_io_submit */
    int32_t state;      /* ds_io_state is written here; any but pending ends the ticket */
    int32_t os_error;   /* the system's error, when failed */
    int64_t moved;      /* bytes transferred */
    int64_t bad_offset; /* of the transfer that failed */
    int64_t bad_bytes;  /* of the transfer that failed */
} ds_io_wait_args;

/* Page-aligned memory. */
typedef struct ds_io_memory_args {
    uint32_t size;  /* sizeof of this struct, as the caller knows it */
    int32_t locked; /* 1: keep it out of the swap file; whether it is, is written */
    int64_t bytes;  /* length */
    void *memory;   /* the address is written here */
} ds_io_memory_args;

/* ---- end of the written section ---- */

/* One step of an optimizer on flat buffers of DS_F32, DS_BF16 or DS_F16. All arithmetic is fp32 without contraction, so
 * every instruction set gives the same bits; 16-bit buffers are widened, and rounded to nearest even when stored.
 * Buffers that overlap, that are null or that are not aligned to their elements are refused. */
DS_EXPORT int ds_adam_step(const ds_adam_args *args);
DS_EXPORT int ds_adagrad_step(const ds_adagrad_args *args);
DS_EXPORT int ds_lion_step(const ds_lion_args *args);
DS_EXPORT int ds_sgd_step(const ds_sgd_args *args);

/* The norms are sums in double, made in one order for any number of threads. */
DS_EXPORT int ds_lamb_step(const ds_lamb_args *args);

/* Any dtype but DS_F64 to any other, as torch casts: to nearest even; what is too large becomes infinite, and 448
 * in DS_E4M3, which has no infinity. */
DS_EXPORT int ds_cast(const ds_cast_args *args);

/* Copies, with a cast where dtypes differ, between many buffers and one flat buffer. */
DS_EXPORT int ds_pieces(const ds_pieces_args *args);

/* Whole numbers of few bits, a scale a group. The values lie as [groups / columns, group_size, columns].
 * weights = 0: scale is fp32, one a group: 1 / s with s = 2^bits / (2 max|x|), code = round(x s); asym: two a group,
 * 1 / s and o, with s = 2^bits / (max - min), o = -2^(bits - 1) - min s, code = round(x s + o). Codes have a sign.
 * weights = 1: scale and least have the dtype of x, one a group: s = h / max|x|, h = 2^(bits - 1) - 1, code =
 * round(x s) + h; asym: s = (2^bits - 1) / (max - min), least = min, code = round((x - min) s).
 * Packed from the low end; 4 bits of weights from the high end of each byte. */
DS_EXPORT int ds_quantize(const ds_quantize_args *args);
DS_EXPORT int ds_dequantize(const ds_dequantize_args *args);

/* Small floats of DS's fp_quantizer: a group is group_size * bits / 8 bytes, then its scale as a little-endian float. */
DS_EXPORT int ds_fp_quantize(const ds_fp_quantize_args *args);
DS_EXPORT int ds_fp_dequantize(const ds_fp_dequantize_args *args);

/* Sum of squares in double; the same bits for any number of threads and any instruction set. */
DS_EXPORT int ds_squared_norm(const ds_norm_args *args);

/* The CRC-32 of zip and zlib, continued from `value` (0 at the start). */
DS_EXPORT uint32_t ds_crc32(const void *data, int64_t bytes, uint32_t value);

/* The same while the bytes are copied, past the caches where both addresses are multiples of 64. */
DS_EXPORT uint32_t ds_copy_crc32(const void *from, void *to, int64_t bytes, uint32_t value);

/* Files. A queue takes requests from any thread; they run side by side and in no order. ds_io_close drops what has not
 * begun, waits for what has, and must be the last call on its queue: until a request is over its memory is in use. */
DS_EXPORT int ds_io_open(ds_io_open_args *args);
DS_EXPORT int ds_io_submit(ds_io_submit_args *args);
DS_EXPORT int ds_io_wait(ds_io_wait_args *args);
DS_EXPORT void ds_io_close(void *queue);

/* The backends that work here, best first, as "io_uring threads". */
DS_EXPORT const char *ds_io_backends(void);

/* Memory for the fastest transfers; a limit on locked memory is no failure. */
DS_EXPORT int ds_io_alloc(ds_io_memory_args *args);
DS_EXPORT void ds_io_unlock(void *memory, int64_t bytes);
DS_EXPORT void ds_io_free(void *memory);

/* Message of the last failure on this thread ("" before any); valid until the next failure on it. */
DS_EXPORT const char *ds_last_error(void);

DS_EXPORT uint32_t ds_abi_version(void);

/* Writes sizeof and the offset of each field of the named struct; returns how many numbers that is (0: no such
 * struct). Nothing is written beyond `capacity`. */
DS_EXPORT uint32_t ds_abi_layout(const char *name, uint32_t *out, uint32_t capacity);

/* The instruction sets that this library has and this CPU runs, best first, as "avx512 avx2 scalar". */
DS_EXPORT const char *ds_isa_list(void);

/* The one in use. */
DS_EXPORT const char *ds_isa(void);

/* Chooses one by name, "auto" for the best. */
DS_EXPORT int ds_set_isa(const char *name);

#ifdef __cplusplus
}
#endif

#endif
