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
#define DS_ABI_VERSION 1

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

enum ds_dtype { DS_F32 = 0, DS_BF16 = 1, DS_F16 = 2, DS_F64 = 3 };

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

/* One step of an optimizer on flat buffers; DS_F64 is not served. All arithmetic is fp32 without contraction, so
 * every instruction set gives the same bits; 16-bit buffers are widened, and rounded to nearest even when stored. */
DS_EXPORT int ds_adam_step(const ds_adam_args *args);
DS_EXPORT int ds_adagrad_step(const ds_adagrad_args *args);
DS_EXPORT int ds_lion_step(const ds_lion_args *args);

/* Sum of squares in double; the same bits for any number of threads and any instruction set. */
DS_EXPORT int ds_squared_norm(const ds_norm_args *args);

/* The CRC-32 of zip and zlib, continued from `value` (0 at the start). */
DS_EXPORT uint32_t ds_crc32(const void *data, int64_t bytes, uint32_t value);

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
