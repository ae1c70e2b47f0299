// JSON, read strictly: nlohmann's reader alone takes a name twice, any depth, and 1.5 for a whole number.
#pragma once

#define JSON_DIAGNOSTICS 1  // the library's messages say where in the document
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lavin {

using Json = nlohmann::json;

// Throws InputError where `text` is no JSON, nests deeper than 64 levels or names a key twice.
Json parse_json(std::string_view text);

// A whole number, and a list of them; throw InputError where the value is anything else.
int64_t whole(const Json& value);
std::vector<int64_t> wholes(const Json& value);

// What an exception of ours or of the library says, without the library's number of it.
std::string reason(const std::exception& error);

}  // namespace lavin
