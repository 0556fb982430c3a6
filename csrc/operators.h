// Operators of torch's dispatcher by name.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace sign_fast {

// To be kept: looking it up takes a lock. Throws where Python has not defined the operator.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace sign_fast
