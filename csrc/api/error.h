// SPDX-License-Identifier: Apache-2.0
// The message of the last failure on the calling thread.
#pragma once

namespace ds {

// Keeps the message (cut to 255 characters) and returns `status`, so that callers can `return fail(...)`.
int fail(int status, const char *format, ...);

}  // namespace ds
