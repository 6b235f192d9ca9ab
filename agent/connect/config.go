package connect

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluicemesh/sluice/acl"
)

// ProviderBuiltin is the name of the certificate authority that keeps its keys
// in the replicated state. It is the only one so far.
const ProviderBuiltin = "consul"

// Settings is a CA configuration, parsed.
type Settings struct {
	LeafCertTTL         time.Duration // 72h
	IntermediateCertTTL time.Duration // 8760h
	RootCertTTL         time.Duration // 87600h
	PrivateKeyType      string        // "ec" or "rsa"
	PrivateKeyBits      int
	// CSRMaxPerSecond limits how many leaves one server signs; 0 is no limit.
	CSRMaxPerSecond float64
	// CSRMaxConcurrent counts where CSRMaxPerSecond is 0; 0 is no limit.
	CSRMaxConcurrent int
	// PrivateKey and RootCert (PEM) bring a root of the operator's own.
	PrivateKey acl.Secret
	RootCert   string
	// ClusterID pins the trust domain; empty generates one.
	ClusterID string
	// SkipValidate lets lifetimes be shorter than is sensible, for tests.
	SkipValidate bool
}

// Limits of the lifetimes.
const (
	minLeafCertTTL         = time.Hour
	maxLeafCertTTL         = 365 * 24 * time.Hour
	minIntermediateCertTTL = 3 * time.Hour
)

func defaultSettings() Settings {
	return Settings{
		LeafCertTTL:         72 * time.Hour,
		IntermediateCertTTL: 8760 * time.Hour,
		RootCertTTL:         87600 * time.Hour,
		PrivateKeyType:      "ec",
		CSRMaxPerSecond:     50,
	}
}

// caKeys maps a key's bare lower-case form to its canonical one. Those without
// a meaning here are accepted because configurations in the wild have them.
var caKeys = map[string]string{
	"leafcertttl":         "LeafCertTTL",
	"intermediatecertttl": "IntermediateCertTTL",
	"rootcertttl":         "RootCertTTL",
	"privatekeytype":      "PrivateKeyType",
	"privatekeybits":      "PrivateKeyBits",
	"csrmaxpersecond":     "CSRMaxPerSecond",
	"csrmaxconcurrent":    "CSRMaxConcurrent",
	"privatekey":          "PrivateKey",
	"rootcert":            "RootCert",
	"clusterid":           "ClusterID",
	"skipvalidate":        "SkipValidate",
	"rotationperiod":      "RotationPeriod",
}

var uuidPattern = regexp.MustCompile(`^(?i)[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// ValidClusterID says whether id is a UUID, as a trust domain must begin with.
func ValidClusterID(id string) bool { return uuidPattern.MatchString(id) }

// CanonicalCAConfig returns raw with its keys in CamelCase, whichever way they
// were written, and the default lifetimes where it has none: the form in which
// a configuration is stored and shown. Unknown keys stay as they are.
func CanonicalCAConfig(raw map[string]any) map[string]any {
	out := map[string]any{
		"LeafCertTTL":         "72h",
		"IntermediateCertTTL": "8760h",
		"RootCertTTL":         "87600h",
	}
	for _, k := range slices.Sorted(maps.Keys(raw)) {
		v := raw[k]
		if s, ok := v.(acl.Secret); ok {
			v = s.Reveal()
		}
		if canon, ok := caKeys[bareKey(k)]; ok {
			out[canon] = v
		} else {
			out[k] = v
		}
	}
	return out
}

func bareKey(k string) string { return strings.ToLower(strings.ReplaceAll(k, "_", "")) }

// ParseCAConfig reads a CA configuration written with CamelCase or snake_case
// keys and checks it. It reports all problems.
func ParseCAConfig(provider string, raw map[string]any) (Settings, error) {
	s := defaultSettings()
	if provider != "" && provider != ProviderBuiltin {
		return s, fmt.Errorf("unknown CA provider %q: only %q is supported", provider, ProviderBuiltin)
	}
	var errs []error
	for _, k := range slices.Sorted(maps.Keys(raw)) {
		v := raw[k]
		if v == nil {
			continue
		}
		var err error
		switch bareKey(k) {
		case "leafcertttl":
			s.LeafCertTTL, err = toDuration(v)
		case "intermediatecertttl":
			s.IntermediateCertTTL, err = toDuration(v)
		case "rootcertttl":
			s.RootCertTTL, err = toDuration(v)
		case "privatekeytype":
			s.PrivateKeyType, err = toString(v)
		case "privatekeybits":
			s.PrivateKeyBits, err = toInt(v)
		case "csrmaxpersecond":
			s.CSRMaxPerSecond, err = toFloat(v)
		case "csrmaxconcurrent":
			s.CSRMaxConcurrent, err = toInt(v)
		case "privatekey":
			var key string
			key, err = toString(v)
			s.PrivateKey = acl.Secret(key)
		case "rootcert":
			s.RootCert, err = toString(v)
		case "clusterid":
			s.ClusterID, err = toString(v)
		case "skipvalidate":
			s.SkipValidate, err = toBool(v)
		case "rotationperiod":
		default:
			err = errors.New("invalid config key")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", k, err))
		}
	}
	s.ClusterID = strings.ToLower(s.ClusterID)
	if len(errs) == 0 {
		errs = append(errs, s.validate())
	}
	if s.PrivateKeyBits == 0 {
		s.PrivateKeyBits = 256
		if s.PrivateKeyType == "rsa" {
			s.PrivateKeyBits = 4096
		}
	}
	return s, errors.Join(errs...)
}

// validate's texts are Consul's where it has one.
func (s Settings) validate() error {
	var errs []error
	if !s.SkipValidate {
		if s.LeafCertTTL < minLeafCertTTL {
			errs = append(errs, fmt.Errorf("leaf cert TTL must be greater or equal than %s", minLeafCertTTL))
		}
		if s.LeafCertTTL > maxLeafCertTTL {
			errs = append(errs, fmt.Errorf("leaf cert TTL must be less than %s", maxLeafCertTTL))
		}
		if s.IntermediateCertTTL < minIntermediateCertTTL {
			errs = append(errs, fmt.Errorf("Intermediate Cert TTL must be greater or equal than %s", minIntermediateCertTTL)) //nolint:staticcheck // clients match the text
		}
		if s.IntermediateCertTTL < 3*s.LeafCertTTL {
			errs = append(errs, fmt.Errorf("Intermediate Cert TTL must be greater or equal than 3 * LeafCertTTL (>=%s)", 3*s.LeafCertTTL)) //nolint:staticcheck // clients match the text
		}
		if s.RootCertTTL < s.IntermediateCertTTL {
			errs = append(errs, fmt.Errorf("root cert TTL is set and is not greater than intermediate cert ttl. root cert ttl: %s, intermediate cert ttl: %s",
				s.RootCertTTL, s.IntermediateCertTTL))
		}
	} else if min(s.LeafCertTTL, s.IntermediateCertTTL, s.RootCertTTL) <= 0 {
		errs = append(errs, errors.New("cert TTLs must be positive"))
	}
	errs = append(errs, validateKeyKind(s.PrivateKeyType, s.PrivateKeyBits))
	if s.CSRMaxPerSecond < 0 || math.IsNaN(s.CSRMaxPerSecond) {
		errs = append(errs, errors.New("csr_max_per_second must not be negative"))
	}
	if s.CSRMaxConcurrent < 0 {
		errs = append(errs, errors.New("csr_max_concurrent must not be negative"))
	}
	if (s.PrivateKey == "") != (s.RootCert == "") {
		errs = append(errs, errors.New("must provide both private_key and root_cert, or neither"))
	}
	if s.ClusterID != "" && !ValidClusterID(s.ClusterID) {
		errs = append(errs, errors.New("cluster_id was supplied but was not a valid UUID"))
	}
	return errors.Join(errs...)
}

func validateKeyKind(kind string, bits int) error {
	switch kind {
	case "ec":
		if bits != 0 && !slices.Contains([]int{224, 256, 384, 521}, bits) {
			return errors.New("EC key length must be one of (224, 256, 384, 521) bits")
		}
	case "rsa":
		if bits != 0 && bits != 2048 && bits != 4096 {
			return errors.New("RSA key length must be 2048 or 4096 bits")
		}
	default:
		return errors.New("private key type must be either 'ec' or 'rsa'")
	}
	return nil
}

func toDuration(v any) (time.Duration, error) {
	switch v := v.(type) {
	case time.Duration:
		return v, nil
	case string:
		return time.ParseDuration(v)
	case float64, int, int64, json.Number:
		f, err := toFloat(v)
		return time.Duration(f), err
	}
	return 0, fmt.Errorf("a %T is not a duration", v)
}

func toString(v any) (string, error) {
	switch v := v.(type) {
	case string:
		return v, nil
	case acl.Secret:
		return v.Reveal(), nil
	}
	return "", fmt.Errorf("a %T is not a string", v)
}

func toFloat(v any) (float64, error) {
	switch v := v.(type) {
	case float64:
		return v, nil
	case float32:
		return float64(v), nil
	case int:
		return float64(v), nil
	case int64:
		return float64(v), nil
	case json.Number:
		return v.Float64()
	case string:
		return strconv.ParseFloat(v, 64)
	}
	return 0, fmt.Errorf("a %T is not a number", v)
}

func toInt(v any) (int, error) {
	f, err := toFloat(v)
	if err == nil && (f != math.Trunc(f) || math.Abs(f) > math.MaxInt32) {
		err = fmt.Errorf("%v is not a whole number", v)
	}
	return int(f), err
}

func toBool(v any) (bool, error) {
	switch v := v.(type) {
	case bool:
		return v, nil
	case string:
		return strconv.ParseBool(v)
	}
	return false, fmt.Errorf("a %T is not a boolean", v)
}

// SameKeyMaterial says whether two configurations ask for the same root, so
// that going from one to the other need not rotate it.
func (s Settings) SameKeyMaterial(o Settings) bool {
	return s.PrivateKeyType == o.PrivateKeyType && s.PrivateKeyBits == o.PrivateKeyBits &&
		s.PrivateKey == o.PrivateKey && s.RootCert == o.RootCert
}

// ErrStateReadOnly is returned for a CA configuration that would write the
// provider's own state.
var ErrStateReadOnly = errors.New("Provider State is read-only. It must be omitted or identical to the current value") //nolint:staticcheck // clients match the text

// ErrUninitialized is returned by signing before the CA has a key.
var ErrUninitialized = errors.New("CA is uninitialized and unable to sign certificates yet: provider is nil")

// ErrNotFinished is returned by reads of the CA before it has roots.
var ErrNotFinished = errors.New("CA has not finished initializing")
