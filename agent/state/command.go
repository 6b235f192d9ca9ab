package state

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
)

// commandVersion is the first byte of an encoded command. A server that meets a
// later one has to be upgraded before it can go on.
const commandVersion = 1

// commandType is the second byte. The numbers are in logs on disk: they are
// never given to another type.
type commandType byte

const (
	typeRegister              commandType = 1
	typeDeregister            commandType = 2
	typeConfigEntry           commandType = 3
	typeFederationState       commandType = 4
	typeDeleteFederationState commandType = 5
	typeCARoots               commandType = 6
	typeCAConfig              commandType = 7
	typeCAState               commandType = 8
	typeCASerial              commandType = 9
	typeBatch                 commandType = 10
)

// errUnknownCommand is wrapped where a command is of a later version or of an
// unknown type: not damaged, but written by a newer server.
var errUnknownCommand = errors.New("unknown command")

// Command is one write to the state. The zero Command is not valid.
//
// What a record holds is JSON afterwards: the state machine sees what Encode
// wrote, on the leader too, so that all servers hold the same.
type Command struct {
	typ  commandType
	body any
}

// RegisterCommand writes a node with a service and checks, as
// /v1/catalog/register does. The result is true.
//
// A node that has the same ID under another name is renamed: what was registered
// under the old name goes. A name can be taken over by another ID only from a
// node that gossip holds for failed.
func RegisterCommand(reg *api.CatalogRegistration) Command { return Command{typeRegister, reg} }

// DeregisterCommand removes a service with its checks, a check, or a whole node,
// as /v1/catalog/deregister does. The result is true, also for what is not there.
func DeregisterCommand(d *api.CatalogDeregistration) Command { return Command{typeDeregister, d} }

// ConfigEntryOp is a way to write a configuration entry.
type ConfigEntryOp string

// Ways to write a configuration entry. The result is true, or false when a
// compare-and-set missed. All but the replica's are refused, with an error, when a
// discovery chain would not compile any more.
const (
	ConfigEntryUpsert ConfigEntryOp = "upsert"
	// ConfigEntryUpsertCAS writes if the entry has the given ModifyIndex; 0 means
	// that there is none. To write what is there already succeeds with any index.
	ConfigEntryUpsertCAS ConfigEntryOp = "upsert-cas"
	ConfigEntryDelete    ConfigEntryOp = "delete"
	// ConfigEntryDeleteCAS deletes if the entry has the given ModifyIndex. To
	// delete what is not there succeeds.
	ConfigEntryDeleteCAS ConfigEntryOp = "delete-cas"
	// ConfigEntryReplicate and ConfigEntryReplicateDelete write what the primary
	// datacenter has accepted. Chains are not compiled: a copy in the making may be
	// inconsistent for a while, and to refuse it would stop replication for good.
	ConfigEntryReplicate       ConfigEntryOp = "replicate"
	ConfigEntryReplicateDelete ConfigEntryOp = "replicate-delete"
)

func (op ConfigEntryOp) deletes() bool {
	return op == ConfigEntryDelete || op == ConfigEntryDeleteCAS || op == ConfigEntryReplicateDelete
}

func (op ConfigEntryOp) valid() bool {
	return op == ConfigEntryUpsert || op == ConfigEntryUpsertCAS || op == ConfigEntryReplicate || op.deletes()
}

// ConfigEntryCommand writes or deletes an entry, which must be normalised and
// valid; of one to delete only the kind and the name count. index is that of a
// compare-and-set. The indexes in the entry are ignored.
func ConfigEntryCommand(op ConfigEntryOp, e configentry.Entry, index uint64) Command {
	return Command{typeConfigEntry, &configEntryCommand{
		Op: op, Kind: e.GetKind(), Name: entryName(e), Index: index, entry: e,
	}}
}

// FederationStateCommand writes a datacenter's record; one without a
// PrimaryModifyIndex is the primary's own write. The result is true. A record
// that says the same as the one there changes nothing.
func FederationStateCommand(s *FederationState) Command { return Command{typeFederationState, s} }

// DeleteFederationStateCommand removes a datacenter's record. The result is
// true.
func DeleteFederationStateCommand(datacenter string) Command {
	return Command{typeDeleteFederationState, &deleteFederationState{datacenter}}
}

// CARootsCommand replaces the set of roots if cas is the index that
// [Store.CARoots] returns, 0 at first; else the result is false.
func CARootsCommand(cas uint64, roots *connect.Roots) Command {
	return Command{typeCARoots, &caRootsCommand{cas, roots}}
}

// CAConfigCommand writes the CA's configuration. If its ModifyIndex is not 0 it
// must be that of the configuration it replaces; else the result is false.
func CAConfigCommand(c *connect.CAConfig) Command { return Command{typeCAConfig, c} }

// CAStateCommand writes the built-in provider's state. If its ModifyIndex is not
// 0 it must be that of the state it replaces; else the result is false. The serial
// number never goes back.
func CAStateCommand(s *connect.CAState) Command { return Command{typeCAState, s} }

// CASerialCommand takes the next serial number of the built-in provider; the
// result is the number, a uint64.
func CASerialCommand() Command { return Command{typeCASerial, &struct{}{}} }

// BatchCommand applies several commands as one: all or, when one of them is
// refused or misses its compare-and-set, none; the result is then its error or
// false, else true. Discovery chains are compiled after the last one, so that the
// order of configuration entries within a batch does not matter. A raft log
// entry should stay well under a megabyte. Batches do not nest.
func BatchCommand(cmds ...Command) Command { return Command{typeBatch, &batchCommand{cmds}} }

type (
	configEntryCommand struct {
		Op         ConfigEntryOp
		Kind, Name string
		Index      uint64          `json:",omitempty"`
		Entry      json.RawMessage `json:",omitempty"`

		entry configentry.Entry
	}
	deleteFederationState struct{ Datacenter string }
	caRootsCommand        struct {
		CAS   uint64
		Roots *connect.Roots
	}
	batchCommand struct{ commands []Command }
	batchItem    struct {
		Type commandType
		Data json.RawMessage
	}
	// caConfigRecord and caStateRecord are what the log and snapshots hold of
	// records whose own JSON form leaves something out. Logs and snapshots are
	// readable by their owner alone.
	caConfigRecord struct {
		ClusterID string
		*connect.CAConfig
	}
	caStateRecord struct {
		RootKeyPEM, RootCertPEM                 string
		IntermediateKeyPEM, IntermediateCertPEM string
		Serial, ModifyIndex                     uint64
	}
)

func recordOfState(s *connect.CAState) *caStateRecord {
	return &caStateRecord{
		RootKeyPEM: s.RootKeyPEM.Reveal(), RootCertPEM: s.RootCertPEM,
		IntermediateKeyPEM: s.IntermediateKeyPEM.Reveal(), IntermediateCertPEM: s.IntermediateCertPEM,
		Serial: s.Serial, ModifyIndex: s.ModifyIndex,
	}
}

func (r *caStateRecord) state() *connect.CAState {
	return &connect.CAState{
		RootKeyPEM: acl.Secret(r.RootKeyPEM), RootCertPEM: r.RootCertPEM,
		IntermediateKeyPEM: acl.Secret(r.IntermediateKeyPEM), IntermediateCertPEM: r.IntermediateCertPEM,
		Serial: r.Serial, ModifyIndex: r.ModifyIndex,
	}
}

func recordOfConfig(c *connect.CAConfig) *caConfigRecord { return &caConfigRecord{c.ClusterID, c} }

func (r *caConfigRecord) config() *connect.CAConfig {
	r.CAConfig.ClusterID = r.ClusterID
	return r.CAConfig
}

// Encode returns the command's form in the raft log: a version, a type, and JSON.
// It holds secrets in the clear.
func (c Command) Encode() ([]byte, error) {
	data, err := c.encodeBody()
	if err != nil {
		return nil, fmt.Errorf("encode command %d: %w", c.typ, err)
	}
	return append([]byte{commandVersion, byte(c.typ)}, data...), nil
}

func (c Command) encodeBody() ([]byte, error) {
	switch b := c.body.(type) {
	case nil:
		return nil, errors.New("empty command")
	case *configEntryCommand:
		out := *b
		if !b.Op.deletes() {
			data, err := json.Marshal(b.entry)
			if err != nil {
				return nil, err
			}
			out.Entry = data
		}
		return json.Marshal(&out)
	case *connect.CAConfig:
		return json.Marshal(recordOfConfig(b))
	case *connect.CAState:
		return json.Marshal(recordOfState(b))
	case *batchCommand:
		items := make([]batchItem, len(b.commands))
		for i, sub := range b.commands {
			if sub.typ == typeBatch {
				return nil, errors.New("batch within a batch")
			}
			data, err := sub.encodeBody()
			if err != nil {
				return nil, fmt.Errorf("command %d of a batch: %w", i, err)
			}
			items[i] = batchItem{sub.typ, data}
		}
		return json.Marshal(items)
	}
	return json.Marshal(c.body)
}

// DecodeCommand is the inverse of [Command.Encode].
func DecodeCommand(data []byte) (Command, error) {
	if len(data) < 2 {
		return Command{}, fmt.Errorf("decode command: %d bytes", len(data))
	}
	if data[0] != commandVersion {
		return Command{}, fmt.Errorf("decode command: %w: version %d", errUnknownCommand, data[0])
	}
	c, err := decodeBody(commandType(data[1]), data[2:])
	if err != nil {
		return Command{}, fmt.Errorf("decode command %d: %w", data[1], err)
	}
	return c, nil
}

func decodeBody(typ commandType, data []byte) (Command, error) {
	switch typ {
	case typeRegister:
		return decodeInto(typ, data, &api.CatalogRegistration{}, checkRegistration)
	case typeDeregister:
		return decodeInto(typ, data, &api.CatalogDeregistration{}, nil)
	case typeConfigEntry:
		return decodeInto(typ, data, &configEntryCommand{}, (*configEntryCommand).decodeEntry)
	case typeFederationState:
		return decodeInto(typ, data, &FederationState{}, (*FederationState).check)
	case typeDeleteFederationState:
		return decodeInto(typ, data, &deleteFederationState{}, nil)
	case typeCARoots:
		return decodeInto(typ, data, &caRootsCommand{}, func(c *caRootsCommand) error { return checkRoots(c.Roots) })
	case typeCAConfig:
		r := &caConfigRecord{CAConfig: &connect.CAConfig{}}
		if err := json.Unmarshal(data, r); err != nil {
			return Command{}, err
		}
		return CAConfigCommand(r.config()), nil
	case typeCAState:
		r := &caStateRecord{}
		if err := json.Unmarshal(data, r); err != nil {
			return Command{}, err
		}
		return CAStateCommand(r.state()), nil
	case typeCASerial:
		return CASerialCommand(), nil
	case typeBatch:
		var items []batchItem
		if err := json.Unmarshal(data, &items); err != nil {
			return Command{}, err
		}
		b := &batchCommand{commands: make([]Command, len(items))}
		for i, item := range items {
			if item.Type == typeBatch {
				return Command{}, errors.New("batch within a batch")
			}
			var err error
			if b.commands[i], err = decodeBody(item.Type, item.Data); err != nil {
				return Command{}, fmt.Errorf("command %d of a batch: %w", i, err)
			}
		}
		return Command{typ, b}, nil
	}
	return Command{}, fmt.Errorf("%w: type %d", errUnknownCommand, typ)
}

func decodeInto[T any](typ commandType, data []byte, body *T, check func(*T) error) (Command, error) {
	if err := json.Unmarshal(data, body); err != nil {
		return Command{}, err
	}
	if check != nil {
		if err := check(body); err != nil {
			return Command{}, err
		}
	}
	return Command{typ, body}, nil
}

func (c *configEntryCommand) decodeEntry() error {
	if !c.Op.valid() {
		return fmt.Errorf("unknown operation %q", string(c.Op))
	}
	if c.Op.deletes() {
		return nil
	}
	e, err := decodeEntry(c.Kind, c.Entry)
	if err != nil {
		return err
	}
	c.entry, c.Entry, c.Name = e, nil, entryName(e)
	return nil
}

// decodeEntry decodes an entry that is in its stored form. It does not judge it:
// that was done before it was written.
func decodeEntry(kind string, data []byte) (configentry.Entry, error) {
	e, err := api.MakeConfigEntry(kind, "")
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, e); err != nil {
		return nil, fmt.Errorf("config entry of kind %q: %w", kind, err)
	}
	if e.GetKind() != kind {
		return nil, fmt.Errorf("config entry of kind %q: says it is of kind %q", kind, e.GetKind())
	}
	return e, nil
}

func checkRegistration(reg *api.CatalogRegistration) error {
	for _, c := range reg.Checks {
		if c == nil {
			return errors.New("empty check")
		}
	}
	return nil
}

func (s *FederationState) check() error {
	if s.Datacenter == "" {
		return errors.New("federation state without a datacenter")
	}
	for _, inst := range s.MeshGateways {
		if inst == nil || inst.Node == nil || inst.Service == nil {
			return fmt.Errorf("federation state of %q: incomplete gateway", s.Datacenter)
		}
		for _, c := range inst.Checks {
			if c == nil {
				return fmt.Errorf("federation state of %q: incomplete check", s.Datacenter)
			}
		}
	}
	return nil
}

func checkRoots(roots *connect.Roots) error {
	if roots == nil {
		return errors.New("no roots")
	}
	for _, r := range roots.Roots {
		if r == nil {
			return errors.New("empty root")
		}
	}
	return nil
}

// apply carries out a command. The records in it belong to the store afterwards.
func (w *writer) apply(c Command) any {
	switch b := c.body.(type) {
	case *api.CatalogRegistration:
		return w.register(b)
	case *api.CatalogDeregistration:
		return w.deregister(b)
	case *configEntryCommand:
		return w.configEntry(b)
	case *FederationState:
		return w.upsertFederationState(b)
	case *deleteFederationState:
		return w.deleteFederationState(b.Datacenter)
	case *caRootsCommand:
		return w.setCARoots(b.CAS, b.Roots)
	case *connect.CAConfig:
		return w.setCAConfig(b)
	case *connect.CAState:
		return w.setCAState(b)
	case *batchCommand:
		for i, sub := range b.commands {
			res := w.apply(sub)
			if err, failed := res.(error); failed {
				return fmt.Errorf("command %d of a batch: %w", i, err)
			}
			if res == false {
				return false
			}
		}
		return true
	}
	if c.typ == typeCASerial {
		return w.nextSerial()
	}
	return fmt.Errorf("apply command: unexpected %T", c.body)
}
