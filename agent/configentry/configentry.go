// Package configentry is the vocabulary of centralised configuration: the kinds
// of entry, how they are decoded, normalised and validated, and the pure
// computations over them: the merge of central configuration into a
// registration, the compilation of a discovery chain, and the decision of an
// intention. It does no I/O.
//
// Entries are the public API module's types (see package catalog for why).
package configentry

import (
	"github.com/hashicorp/consul/api"
)

// Entry is a configuration entry of any kind.
type Entry = api.ConfigEntry

// Kinds in the order in which the documentation lists them.
const (
	ProxyDefaults     = api.ProxyDefaults
	ServiceDefaults   = api.ServiceDefaults
	ServiceResolver   = api.ServiceResolver
	ServiceRouter     = api.ServiceRouter
	ServiceSplitter   = api.ServiceSplitter
	ServiceIntentions = api.ServiceIntentions
	Mesh              = api.MeshConfig
	ExportedServices  = api.ExportedServices
)

// Global is the only name a proxy-defaults entry has.
const Global = api.ProxyConfigGlobal

// Get reads one entry; nil without an error means that there is none. The
// functions of this package read what they need through it, so that the caller
// decides where entries come from and which of them it is woken for.
type Get func(kind, name string) (Entry, error)

// Intention says whether a source service may connect to a destination.
type Intention = api.Intention
